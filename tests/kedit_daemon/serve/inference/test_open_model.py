from collections.abc import Callable
from pathlib import Path

import torch
from editing_home import Bench

from kedit_daemon.config import Config
from kedit_daemon.serve.inference.open_model import open_reader
from memory.files import save_tensors


def test_the_active_generation_is_served_from_the_first_moment(
    bench: Callable[..., Bench], model_folder: Callable[[str], Path]
) -> None:
    made = bench(kind="llama")
    store, shape = made.store, made.loaded.model.base_weight(0).shape
    sha = save_tensors(made.home.generations_folder, {"0": torch.zeros(shape)})
    with store.db.transaction():
        number = store.artifacts.add_generation(sha, "", 0, "flush", (), {})
        store.artifacts.activate_generation(number)
    reader = open_reader(made.home, Config(model=str(model_folder("llama")), device="cpu"))
    generation = reader.engine.status.generation
    reader.engine.close()
    assert generation == number
