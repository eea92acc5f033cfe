"""What is served lies in memory, where it may be damaged: it is looked through, and laid anew from
the files and the store.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_daemon.editing.flush import Flush
from kedit_daemon.editing.live_model import LiveModel
from memory.db import meta_keys
from memory.errors import KeditError
from memory.facts import FactState
from memory.side.side_memory import Shard, SideMemory, to_fact_id
from policies.edit_terms import unpack_terms

TERMS_PER_TURN = 200  # facts whose stored targets are looked at in one turn


@dataclass(frozen=True)
class Damage:
    """What in memory is not as it should be: in words, and what of it lies where."""

    reasons: list[str]
    has_weights_damage: bool
    has_side_damage: bool
    unsolvable_facts: list[str]  # facts in the weights that could not be solved for again


def find_damage(served: LiveModel, weights_hash: str, turn: int) -> Damage:
    """Whether the weights are those that were published, and the side memory is finite. Of the
    stored targets some are looked at, others in each `turn`."""
    weights = read_active_hash(served) != weights_hash
    reasons = ["the weights are not those that were published"] if weights else []
    side = list(_find_side_damage(served.side))
    ids = served.list_weights_facts()
    first = turn * TERMS_PER_TURN % max(len(ids), 1)
    terms = [
        n for n in [*ids[first:], *ids[:first]][:TERMS_PER_TURN] if not _is_solvable(served, n)
    ]
    if terms:  # all have to be known: one is enough to let a solve fail
        terms = [n for n in ids if not _is_solvable(served, n)]
    reasons += side + [f"the targets of fact {n} are damaged" for n in sorted(terms)]
    return Damage(reasons, weights, bool(side), terms)


def read_active_hash(served: LiveModel) -> str:
    """The hash of the active generation's weights: without facts, of the model's own."""
    row = served.store.artifacts.get_generation(served.store.artifacts.active_generation())
    return served.unedited_hash if row.sha256 is None else row.weights_hash


def repair_damage(flush: Flush, found: Damage) -> None:
    """Lay anew what is damaged, and write it down. A fact whose targets cannot be computed again
    leaves the weights, and is learned in the side memory."""
    served, store = flush.live_model, flush.store
    with store.db.transaction():
        store.db.write_event("mended", reasons=found.reasons)
    facts = [
        f
        for n in found.unsolvable_facts
        if (f := store.find_fact(n)) and f.state is FactState.LIVE_WEIGHTS
    ]
    refused = flush.ensure_terms([f.fact for f in facts], again=True)
    if gone := [f for f in facts if f.id in refused]:  # first: no solve is possible with them
        with store.db.transaction():
            for fact in gone:
                store.artifacts.drop_terms(fact.id)
        flush.generations.send_to_side(gone, "its targets cannot be computed again")
    if found.has_weights_damage:
        served.restore_weights()
    if found.has_side_damage:
        served.rebuild_side()
    if facts:
        with store.db.transaction():
            store.db.set_meta(meta_keys.FLUSH_HELD, None)  # it may have been for these


def _find_side_damage(side: SideMemory) -> Iterator[str]:
    for number in sorted(n for n, shard in side.shards.items() if not _is_shard_finite(shard)):
        yield f"shard {number} is not finite"
    for number in side.find_non_finite_keys():
        yield f"key of fact {to_fact_id(number)} is not finite"
    for fact_id in sorted(n for n, keys in side.end_keys.items() if not _is_finite(keys)):
        yield f"end key of fact {fact_id} is not finite"


def _is_solvable(served: LiveModel, fact_id: str) -> bool:
    try:
        parts = unpack_terms(served.store.artifacts.read_terms(fact_id))
    except KeditError:
        return False
    return all(_is_finite(tensor) for part in parts for tensor in part.values())


def _is_shard_finite(shard: Shard) -> bool:
    return _is_finite(shard.delta.up) and _is_finite(shard.delta.down)


def _is_finite(numbers: Tensor) -> bool:
    return bool(torch.isfinite(numbers).all())
