import random

import pytest

from policies.batching import Curve, Quality, choose, fit

SIZES = (1, 5, 10, 25, 50, 100, 200)


def good(*sizes: int) -> list[Quality]:
    return [Quality(size, 1.0, 1.0) for size in sizes]


def test_what_lies_on_a_curve_is_found() -> None:
    true = Curve(0.5, 3.0)
    found = fit([(size, true.seconds(size)) for size in SIZES])
    assert (found.per_fact, found.per_batch) == pytest.approx((0.5, 3.0))
    assert true.seconds(6) == 1.0


def test_the_fit_has_the_least_squares() -> None:
    luck = random.Random(0)
    seen = [(size, 0.5 + 3 / size + luck.gauss(0, 0.1)) for size in SIZES]
    found = fit(seen)

    def error(curve: Curve) -> float:
        return sum((curve.seconds(size) - spent) ** 2 for size, spent in seen)

    for a, c in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)):
        assert error(found) < error(Curve(found.per_fact + a, found.per_batch + c))


def test_no_cost_is_below_nothing() -> None:
    dearer = fit([(1, 1.0), (10, 2.0), (100, 3.0)])
    assert dearer == Curve(2.0, 0.0)
    free = fit([(1, 1.0), (2, 0.4), (4, 0.0)])
    assert free.per_fact == 0 and free.per_batch == pytest.approx(1.2 / 1.3125)


def test_one_size_alone_tells_what_a_fact_costs() -> None:
    assert fit([(10, 2.0), (10, 4.0)]) == Curve(3.0, 0.0)
    with pytest.raises(ValueError, match="nothing"):
        fit([])


def test_the_smallest_size_that_is_nearly_as_fast_is_chosen() -> None:
    curve = Curve(1.0, 2.0)  # within a tenth from 20 on
    assert choose(curve, good(*SIZES)) == 25
    assert choose(curve, good(1, 10, 20, 40)) == 20
    assert choose(curve, good(1, 5, 10)) == 10  # none is fast enough
    assert choose(Curve(1.0, 0.0), good(*SIZES)) == 1
    assert choose(Curve(0.0, 1.0), good(*SIZES)) == 200


def test_a_size_that_does_harm_is_not_chosen() -> None:
    curve = Curve(1.0, 2.0)
    poor = [Quality(25, 0.97, 1.0), Quality(50, 1.0, 0.985), Quality(100, 0.99, 0.99)]
    assert choose(curve, [*good(1), *poor]) == 100
    assert choose(curve, [*good(1, 5), *poor[:2]]) == 5


def test_when_no_size_is_good_at_both_the_least_loss_counts() -> None:
    curve = Curve(1.0, 0.0)
    tried = [Quality(1, 1.0, 0.5), Quality(10, 0.8, 0.9), Quality(100, 0.5, 1.0)]
    assert choose(curve, tried) == 10


def test_without_neighbours_reliability_decides() -> None:
    tried = [Quality(1, 0.5, None), Quality(10, 1.0, None)]
    assert choose(Curve(1.0, 0.0), tried) == 10
    with pytest.raises(ValueError, match="tried"):
        choose(Curve(1.0, 0.0), [])
