"""Who is to blame: the facts of a batch that make the weights sick, found by solving without them.

A solve is exact and needs no optimiser, so that every part of a batch can be tried. Halves that are
well are kept whole: k facts among n cost some k log n solves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from policies.stability import Action, Verdict

T = TypeVar("T")


@dataclass(frozen=True)
class Culprits(Generic[T]):
    """What was found of some suspects, each in the order in which they came.

    innocent: they are well together. guilty: each makes the weights sick all by itself, and how.
    crowd: the others, which are too much.
    """

    innocent: list[T]
    culprits: list[tuple[T, Verdict]]
    surplus: list[T]


def find_culprits(
    suspects: Sequence[T],
    judged: Callable[[Sequence[T]], Verdict],
    alone: Callable[[T], Verdict],
    limit: Action,
) -> Culprits[T]:
    """Who of the suspects is to blame for a verdict of `limit` or worse; nobody, where it is so
    without them as well, or where more than half of them would be: then the weights bear no fact.

    judged: the verdict on the weights with some of the suspects, and whatever else there is.
    alone: that on the weights with nothing but one of them.
    """

    def is_healthy(some: Sequence[T]) -> bool:
        return judged(some).action < limit

    def find_innocent(beside: list[T], some: Sequence[T]) -> list[T]:
        if is_healthy([*beside, *some]):
            return list(some)
        if len(some) < 2:
            return []
        half = len(some) // 2
        first = find_innocent(beside, some[:half])
        return [*first, *find_innocent([*beside, *first], some[half:])]

    innocent = find_innocent([], suspects) if is_healthy([]) else list(suspects)
    left = [one for one in suspects if one not in innocent]
    verdicts = [(one, alone(one)) for one in left]
    guilty = [(one, verdict) for one, verdict in verdicts if verdict.action >= limit]
    if 2 * len(guilty) > len(suspects):
        return Culprits(innocent, [], left)
    crowd = [one for one, verdict in verdicts if verdict.action < limit]
    return Culprits(innocent, guilty, crowd)
