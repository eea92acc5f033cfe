from collections.abc import Sequence

import pytest

from policies.culprits import Culprits, find_culprits
from policies.health_limits import Action, Verdict

WELL, SICK = Verdict(Action.KEEP, ()), Verdict(Action.REVERT, ("sick",))


class Weights:
    """Sick with a poisonous fact, or with more than `most` facts; counts how often it is asked."""

    def __init__(self, poison: set[int], most: int = 1000) -> None:
        self.poison, self.most, self.asked = poison, most, 0

    def judged(self, some: Sequence[int]) -> Verdict:
        self.asked += 1
        return SICK if self.poison & set(some) or len(some) > self.most else WELL

    def search(self, suspects: Sequence[int]) -> Culprits[int]:
        return find_culprits(suspects, self.judged, lambda one: self.judged([one]), Action.REVERT)


@pytest.mark.parametrize("poison", [set(), {0}, {99}, {13, 14, 71}, set(range(0, 100, 9))])
def test_just_the_guilty_are_named(poison: set[int]) -> None:
    found = Weights(poison).search(range(100))
    assert found.culprits == [(n, SICK) for n in sorted(poison)]
    assert found.innocent == [n for n in range(100) if n not in poison]
    assert found.surplus == []


def test_few_solves_find_one_among_many() -> None:
    weights = Weights({41})
    weights.search(range(128))
    assert weights.asked < 25


def test_who_comes_last_is_too_many_and_not_guilty() -> None:
    found = Weights({2}, most=5).search(range(10))
    assert found == Culprits([0, 1, 3, 4, 5], [(2, SICK)], [6, 7, 8, 9])


def test_nobody_is_guilty_of_what_is_sick_without_them() -> None:
    weights = Weights(set(), most=-1)
    assert weights.search([1, 2, 3]) == Culprits([1, 2, 3], [], [])
    assert weights.asked == 1


def test_a_milder_verdict_than_the_limit_is_well() -> None:
    mild = Verdict(Action.CONSOLIDATE, ("so so",))

    def judged(some: Sequence[int]) -> Verdict:
        return mild if some else WELL

    assert find_culprits([1, 2], judged, lambda _: mild, Action.REVERT) == Culprits([1, 2], [], [])
    assert find_culprits([1, 2], judged, lambda _: WELL, Action.CONSOLIDATE) == Culprits(
        [], [], [1, 2]
    )


def test_where_most_would_be_guilty_nobody_is() -> None:
    assert Weights({1, 2}).search([1, 2, 3]) == Culprits([3], [], [1, 2])
    assert Weights({1}).search([1]) == Culprits([], [], [1])
    assert Weights({1, 2}).search([1, 2, 3, 4]) == Culprits([3, 4], [(1, SICK), (2, SICK)], [])
