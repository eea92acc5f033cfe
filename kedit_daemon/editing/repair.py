"""What is served lies in memory, where it may be damaged: it is looked through, and laid anew from
the files and the store.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kedit_daemon.editing.flush import Flush
from kedit_daemon.editing.generations import HELD
from kedit_daemon.editing.live_model import Served
from memory.errors import KeditError
from memory.facts import State
from memory.side.side_memory import Shard, SideMemory, fact_id_of
from policies.memit_mass import unpack

TERMS = 200  # facts whose stored targets are looked at in one turn


@dataclass(frozen=True)
class Damage:
    """What in memory is not as it should be: in words, and what of it lies where."""

    reasons: list[str]
    weights: bool
    side: bool
    terms: list[str]  # facts in the weights that could not be solved for again


def look(served: Served, weights_hash: str, turn: int) -> Damage:
    """Whether the weights are those that were published, and the side memory is finite. Of the
    stored targets some are looked at, others in each `turn`."""
    weights = published(served) != weights_hash
    reasons = ["the weights are not those that were published"] if weights else []
    side = list(_side_damage(served.side))
    ids = served.weights_facts()
    first = turn * TERMS % max(len(ids), 1)
    terms = [n for n in [*ids[first:], *ids[:first]][:TERMS] if not _solvable(served, n)]
    if terms:  # all have to be known: one is enough to let a solve fail
        terms = [n for n in ids if not _solvable(served, n)]
    reasons += side + [f"the targets of fact {n} are damaged" for n in sorted(terms)]
    return Damage(reasons, weights, bool(side), terms)


def published(served: Served) -> str:
    """The hash of the active generation's weights: without facts, of the model's own."""
    row = served.store.generation(served.store.active_generation())
    return served.unedited if row.sha256 is None else row.weights_hash


def mend(flush: Flush, found: Damage) -> None:
    """Lay anew what is damaged, and write it down. A fact whose targets cannot be computed again
    leaves the weights, and is learned in the side memory."""
    served, store = flush.served, flush.store
    with store.transaction():
        store.event("mended", reasons=found.reasons)
    facts = [f for n in found.terms if (f := store.fact(n)) and f.state is State.LIVE_WEIGHTS]
    refused = flush.compute([f.fact for f in facts], again=True)
    if gone := [f for f in facts if f.id in refused]:  # first: no solve is possible with them
        with store.transaction():
            for fact in gone:
                store.drop_terms(fact.id)
        flush.weights.send_beside(gone, "its targets cannot be computed again")
    if found.weights:
        served.restore_weights()
    if found.side:
        served.renew_side()
    if facts:
        with store.transaction():
            store.set_meta(HELD, None)  # it may have been for these


def _side_damage(side: SideMemory) -> Iterator[str]:
    for number in sorted(n for n, shard in side.shards.items() if not _whole(shard)):
        yield f"shard {number} is not finite"
    for number in side.broken_keys():
        yield f"key of fact {fact_id_of(number)} is not finite"
    for fact_id in sorted(n for n, keys in side.end_keys.items() if not _finite(keys)):
        yield f"end key of fact {fact_id} is not finite"


def _solvable(served: Served, fact_id: str) -> bool:
    try:
        parts = unpack(served.store.terms(fact_id))
    except KeditError:
        return False
    return all(_finite(tensor) for part in parts for tensor in part.values())


def _whole(shard: Shard) -> bool:
    return _finite(shard.delta.up) and _finite(shard.delta.down)


def _finite(numbers: Tensor) -> bool:
    return bool(torch.isfinite(numbers).all())
