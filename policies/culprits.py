"""Search for the facts of a batch that make the weights unhealthy, by solving without them.

A solve is exact and needs no optimiser, so that every part of a batch can be tried. Halves that are
healthy are kept whole: k culprits among n facts cost about k log n solves.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from policies.health_limits import Action, Verdict

T = TypeVar("T")


@dataclass(frozen=True)
class Culprits(Generic[T]):
    """Result of a search among suspects, each part in the order in which they came.

    innocent: healthy together. culprits: each makes the weights unhealthy on its own, with that
    verdict. surplus: the others, which are too many.
    """

    innocent: list[T]
    culprits: list[tuple[T, Verdict]]
    surplus: list[T]


def find_culprits(
    suspects: Sequence[T],
    judge: Callable[[Sequence[T]], Verdict],
    judge_alone: Callable[[T], Verdict],
    limit: Action,
) -> Culprits[T]:
    """Find the suspects that cause a verdict of `limit` or worse.

    There are no culprits where the verdict is so without the suspects as well, or where more than
    half of them would be: then the weights have no capacity at all.

    judge: the verdict on the weights with some of the suspects, and whatever else there is.
    judge_alone: the verdict on the weights with nothing but one of them.
    """

    def is_healthy(facts: Sequence[T]) -> bool:
        return judge(facts).action < limit

    def find_innocent(kept: list[T], facts: Sequence[T]) -> list[T]:
        if is_healthy([*kept, *facts]):
            return list(facts)
        if len(facts) < 2:
            return []
        half = len(facts) // 2
        first = find_innocent(kept, facts[:half])
        return [*first, *find_innocent([*kept, *first], facts[half:])]

    innocent = find_innocent([], suspects) if is_healthy([]) else list(suspects)
    others = [fact for fact in suspects if fact not in innocent]
    verdicts = [(fact, judge_alone(fact)) for fact in others]
    culprits = [(fact, verdict) for fact, verdict in verdicts if verdict.action >= limit]
    if 2 * len(culprits) > len(suspects):
        return Culprits(innocent, [], others)
    surplus = [fact for fact, verdict in verdicts if verdict.action < limit]
    return Culprits(innocent, culprits, surplus)
