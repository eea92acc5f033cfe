"""Homes with facts in the weights, their exports, and what models answer."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from editing_home import LOOSE, Bench, Clock, seat
from safetensors.torch import load, save
from torch import Tensor
from transformers import AutoModelForCausalLM

from kedit_daemon.config import Config
from kedit_daemon.editing.model_loading import load_model
from kedit_daemon.home import Home
from kedit_daemon.publish.export.source import WrittenExport, read_source
from kedit_daemon.publish.export.writers import WRITERS
from memory.db.store import Store
from memory.facts import Fact
from memory.files import save_tensors
from memory.model.checkpoint import Checkpoint

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
    """Return the answers of the weights tier, without the side memory."""
    return logits(at.loaded.model.hf_model, at.loaded.model.tokenizer)


def written(home: Home, kind: str, to: Path) -> WrittenExport:
    to.mkdir()
    return WRITERS[kind](read_source(home), to)


def loaded(folder: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def still(at: Bench, home: Home, store: Store) -> int:
    """Make the first edited layer bear nothing, in the terms and in what was solved from them."""
    row, first = (
        store.artifacts.get_generation(store.artifacts.active_generation()),
        min(at.loaded.layers),
    )
    for fact_id in row.fact_ids:
        terms = load(store.artifacts.read_terms(fact_id))
        terms[f"residual/{first}"].zero_()
        store.artifacts.put_terms(fact_id, save(terms))
    deltas = {n: d * (n != first) for n, d in at.served.active_deltas.items()}
    sha = save_tensors(home.generations_folder, {str(n): d for n, d in deltas.items()})
    served = Checkpoint(at.loaded.opened.model_folder).weights_hash(at.loaded.layers, deltas)
    store.artifacts.activate_generation(
        store.artifacts.add_generation(sha, served, row.id, "still", row.fact_ids, {})
    )
    return first
