"""Which waiting facts go into the weights together."""

from collections.abc import Mapping, Sequence

from torch import Tensor


def select_members(
    sent: Sequence[str], beside: Sequence[str], keys: Mapping[str, Tensor], size: int
) -> list[str]:
    """At most `size` ids for the next batch, the ones to take first in front.

    sent: facts that came for a batch. beside: facts in the side memory, the oldest first. After
    the former come the oldest of the latter and those most like it, since facts with keys alike
    disturb each other least when they are solved together. keys: subject keys (n, hidden) of unit
    length by id; a fact without any is like no other. Two facts are as alike as the nearest of
    their keys; of facts equally alike the older goes first.
    """
    chosen = list(sent[:size])
    if len(chosen) == size or not beside:
        return chosen
    oldest = keys.get(beside[0])

    def likeness(fact_id: str) -> float:
        own = keys.get(fact_id)
        if own is None or oldest is None or not len(own) or not len(oldest):
            return -1.0
        return float((own @ oldest.T).max())

    others = sorted(beside[1:], key=lambda fact_id: -likeness(fact_id))
    return [*chosen, *[beside[0], *others][: size - len(chosen)]]


def limit_total_size(ids: Sequence[str], sizes: Mapping[str, int], most: int) -> list[str]:
    """The first ids whose sizes together are at most `most`; one at least, or nothing would ever
    move. Sizes in bytes."""
    total, taken = 0, list[str]()
    for fact_id in ids:
        total += sizes[fact_id]
        if taken and total > most:
            break
        taken.append(fact_id)
    return taken
