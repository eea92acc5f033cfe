"""What is served lies in memory, where it may be damaged: it is looked through, and laid anew from
the files and the store.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kedit_daemon.flush import Flush
from kedit_daemon.serving import Served
from memory.errors import KeditError
from memory.facts import State
from memory.side import Shard, fact_id_of
from policies.weights import unpack


def damage(served: Served) -> list[str]:
    """What in memory is not as it was published, in words."""
    found = [] if as_written(served) else ["the weights are not those that were published"]
    side = served.side
    for what, names in (
        ("shard", [str(n) for n, shard in side.shards.items() if not _whole(shard)]),
        ("key of fact", [fact_id_of(n) for n in side.index.broken()]),
        ("end key of fact", [n for n, keys in side.end_keys.items() if not _finite(keys)]),
    ):
        found += [f"{what} {name} is not finite" for name in sorted(names)]
    return [*found, *(f"the targets of fact {n} are damaged" for n in _damaged_terms(served))]


def _damaged_terms(served: Served) -> Iterator[str]:
    """The facts in the weights that could not be solved for again."""
    for fact_id in served.weights_facts():
        try:
            parts = unpack(served.store.terms(fact_id))
        except KeditError:
            yield fact_id
            continue
        if not all(_finite(tensor) for part in parts for tensor in part.values()):
            yield fact_id


def as_written(served: Served) -> bool:
    """Whether the weights in memory are those that were published."""
    return published(served) == served.model.weights_hash(served.loaded.layers)


def published(served: Served) -> str:
    """The hash of the active generation's weights: without facts, of the model's own."""
    row = served.store.generation(served.store.active_generation())
    return served.unedited if row.sha256 is None else row.weights_hash


def mend(flush: Flush, found: list[str]) -> None:
    """Lay anew what `damage` has found, and write it down. A fact whose targets cannot be computed
    again leaves the weights, and is learned in the side memory."""
    served, store = flush.served, flush.store
    if not as_written(served):
        served.restore_weights()
    if served.side.shard_of:
        served.renew_side()
    damaged = [f for n in _damaged_terms(served) if (f := store.fact(n))]
    with store.transaction():
        store.event("mended", reasons=found)
        for fact in damaged:
            store.drop_terms(fact.id)
    refused = flush.compute([f.fact for f in damaged])
    if gone := [f for f in damaged if f.id in refused]:
        flush.weights.take_out(gone, State.RECEIVED, "its targets cannot be computed again")


def _whole(shard: Shard) -> bool:
    return _finite(shard.delta.up) and _finite(shard.delta.down)


def _finite(numbers: Tensor) -> bool:
    return bool(torch.isfinite(numbers).all())
