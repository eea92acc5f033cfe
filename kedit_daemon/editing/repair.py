"""Damage in memory: look for it, and rebuild what is damaged from the files and the store."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_daemon.editing.flush import Flush
from kedit_daemon.editing.generations import Generations
from kedit_daemon.editing.live_model import LiveModel
from memory.db import meta_keys
from memory.errors import KeditError
from memory.facts import FactState
from memory.side.index import to_fact_id
from memory.side.side_memory import SideMemory
from policies.edit_terms import unpack_terms

TERMS_PER_TURN = 200  # facts whose stored targets are checked in one turn


@dataclass(frozen=True)
class Damage:
    """Damage that was found in memory, in words and by part."""

    reasons: list[str]
    has_weights_damage: bool
    has_side_damage: bool
    unsolvable_facts: list[str]  # facts in the weights that could not be solved for again


def find_damage(live_model: LiveModel, weights_hash: str, turn: int) -> Damage:
    """Check that the weights are those of the active generation, the side memory is finite, and
    stored targets can be read: of these only some, others in each `turn`."""
    has_weights_damage = read_active_hash(live_model) != weights_hash
    reasons = ["the weights are not those that were published"] if has_weights_damage else []
    side = list(_find_side_damage(live_model.side))
    ids = live_model.list_weights_facts()
    first = turn * TERMS_PER_TURN % max(len(ids), 1)
    turn_ids = [*ids[first:], *ids[:first]][:TERMS_PER_TURN]
    unsolvable = [n for n in turn_ids if not _is_solvable(live_model, n)]
    if unsolvable:  # all have to be known: one is enough to let a solve fail
        unsolvable = [n for n in ids if not _is_solvable(live_model, n)]
    reasons += side + [f"the targets of fact {n} are damaged" for n in sorted(unsolvable)]
    return Damage(reasons, has_weights_damage, bool(side), unsolvable)


def read_active_hash(live_model: LiveModel) -> str:
    """Read the hash of the active generation's weights: without facts, of the model's own."""
    artifacts = live_model.store.artifacts
    row = artifacts.get_generation(artifacts.active_generation())
    return live_model.unedited_hash if row.sha256 is None else row.weights_hash


def repair_damage(
    live_model: LiveModel, generations: Generations, flush: Flush, damage: Damage
) -> None:
    """Rebuild what is damaged, and record it. A fact whose targets cannot be computed again leaves
    the weights, and is learned in the side memory."""
    store = live_model.store
    with store.db.transaction():
        store.db.write_event("mended", reasons=damage.reasons)
    stored = [f for n in damage.unsolvable_facts if (f := store.find_fact(n))]
    facts = [f for f in stored if f.state is FactState.LIVE_WEIGHTS]
    refused = flush.ensure_terms([f.fact for f in facts], again=True)
    if gone := [f for f in facts if f.id in refused]:  # first: no solve is possible with them
        with store.db.transaction():
            for fact in gone:
                store.artifacts.drop_terms(fact.id)
        generations.move_to_side(gone, "its targets cannot be computed again")
    if damage.has_weights_damage:
        live_model.restore_weights()
    if damage.has_side_damage:
        live_model.rebuild_side()
    if facts:
        with store.db.transaction():
            store.db.set_meta(meta_keys.FLUSH_HELD, None)  # it may have been for these


def _find_side_damage(side: SideMemory) -> Iterator[str]:
    for number, shard in sorted(side.shards.items()):
        if not (_is_finite(shard.delta.up) and _is_finite(shard.delta.down)):
            yield f"shard {number} is not finite"
    for number in side.find_non_finite_keys():
        yield f"key of fact {to_fact_id(number)} is not finite"
    for fact_id, keys in sorted(side.end_keys.items()):
        if not _is_finite(keys):
            yield f"end key of fact {fact_id} is not finite"


def _is_solvable(live_model: LiveModel, fact_id: str) -> bool:
    try:
        parts = unpack_terms(live_model.store.artifacts.read_terms(fact_id))
    except KeditError:
        return False
    return all(_is_finite(tensor) for part in parts for tensor in part.values())


def _is_finite(numbers: Tensor) -> bool:
    return bool(torch.isfinite(numbers).all())
