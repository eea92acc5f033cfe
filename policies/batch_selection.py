"""Selection of the waiting facts that go into the weights together."""

from collections.abc import Mapping, Sequence

from torch import Tensor


def select_members(
    sent: Sequence[str], in_side: Sequence[str], keys: Mapping[str, Tensor], size: int
) -> list[str]:
    """Return at most `size` ids for the next batch, by priority.

    sent: facts that came for a batch. in_side: facts in the side memory, the oldest first. After
    the former come the oldest of the latter and those most similar to it, since facts with similar
    keys disturb each other least when they are solved together. keys: subject keys (n, hidden) of
    unit length by id; a fact without keys is similar to none. The similarity of two facts is that
    of their nearest keys; of equally similar facts the older goes first.
    """
    chosen = list(sent[:size])
    if len(chosen) == size or not in_side:
        return chosen
    oldest = keys.get(in_side[0])

    def compute_similarity(fact_id: str) -> float:
        own = keys.get(fact_id)
        if own is None or oldest is None or not len(own) or not len(oldest):
            return -1.0
        return float((own @ oldest.T).max())

    others = sorted(in_side[1:], key=compute_similarity, reverse=True)
    return [*chosen, *[in_side[0], *others][: size - len(chosen)]]


def limit_total_size(ids: Sequence[str], sizes: Mapping[str, int], max_bytes: int) -> list[str]:
    """Return the first ids whose sizes in bytes sum up to at most `max_bytes`; never less than one,
    or nothing would ever move."""
    total, taken = 0, list[str]()
    for fact_id in ids:
        total += sizes[fact_id]
        if taken and total > max_bytes:
            break
        taken.append(fact_id)
    return taken
