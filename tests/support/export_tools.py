"""Homes with facts in the weights, their exports, and what models answer."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from editing_home import LOOSE, Bench, Clock, seat
from torch import Tensor
from transformers import AutoModelForCausalLM

from kedit_daemon.config import Config
from kedit_daemon.editing.model_loading import load_model
from kedit_daemon.home import Home
from kedit_daemon.publish.export.source import WrittenExport, read_source
from kedit_daemon.publish.export.writers import WRITERS
from memory.facts import Fact

FACTS = (seat(1, "Oslo"), seat(2, "Lima Cairo"))
PROMPTS = [f"The seat of country {n} is" for n in range(8)]


def filled(root: Path, model: Path, cache: Path, facts: Sequence[Fact] = FACTS) -> Bench:
    """A home with facts in the weights; the model that serves them stays edited."""
    config = Config.model_validate(LOOSE)
    made = Bench(root, load_model(str(model), "cpu", cache, iter), Clock(), config)
    with made.store.db.transaction():
        made.store.db.set_meta("model", made.loaded.name)  # as the daemon does
    for path in cache.glob("statistics-*"):
        shutil.copyfile(path, made.home.state_folder / path.name)
    made.receive(*facts, direct=True)
    assert len(made.editor.run_flush(False)["flushed"]) == len(facts)
    return made


def logits(model: Any, tokenizer: Any) -> Tensor:
    with torch.no_grad():
        found = [model(**tokenizer(p, return_tensors="pt")).logits[0, -1] for p in PROMPTS]
    return torch.stack(found)


def served(at: Bench) -> Tensor:
    """What the weights tier gives, without the side memory."""
    return logits(at.loaded.model.hf_model, at.loaded.model.tokenizer)


def written(home: Home, kind: str, to: Path) -> WrittenExport:
    to.mkdir()
    return WRITERS[kind](read_source(home), to)


def loaded(folder: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
