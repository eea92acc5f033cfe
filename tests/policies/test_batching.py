import random

import pytest

from policies.batching import BatchQuality, CostCurve, choose_size, fit_curve

SIZES = (1, 5, 10, 25, 50, 100, 200)


def good(*sizes: int) -> list[BatchQuality]:
    return [BatchQuality(size, 1.0, 1.0) for size in sizes]


def test_what_lies_on_a_curve_is_found() -> None:
    true = CostCurve(0.5, 3.0)
    found = fit_curve([(size, true.estimate_seconds(size)) for size in SIZES])
    assert (found.per_fact, found.per_batch) == pytest.approx((0.5, 3.0))
    assert true.estimate_seconds(6) == 1.0


def test_the_fit_has_the_least_squares() -> None:
    luck = random.Random(0)
    seen = [(size, 0.5 + 3 / size + luck.gauss(0, 0.1)) for size in SIZES]
    found = fit_curve(seen)

    def error(curve: CostCurve) -> float:
        return sum((curve.estimate_seconds(size) - spent) ** 2 for size, spent in seen)

    for a, c in ((0.01, 0), (-0.01, 0), (0, 0.01), (0, -0.01)):
        assert error(found) < error(CostCurve(found.per_fact + a, found.per_batch + c))


def test_no_cost_is_below_nothing() -> None:
    dearer = fit_curve([(1, 1.0), (10, 2.0), (100, 3.0)])
    assert dearer == CostCurve(2.0, 0.0)
    free = fit_curve([(1, 1.0), (2, 0.4), (4, 0.0)])
    assert free.per_fact == 0 and free.per_batch == pytest.approx(1.2 / 1.3125)


def test_one_size_alone_tells_what_a_fact_costs() -> None:
    assert fit_curve([(10, 2.0), (10, 4.0)]) == CostCurve(3.0, 0.0)
    with pytest.raises(ValueError, match="nothing"):
        fit_curve([])


def test_the_smallest_size_that_is_nearly_as_fast_is_chosen() -> None:
    curve = CostCurve(1.0, 2.0)  # within a tenth from 20 on
    assert choose_size(curve, good(*SIZES)) == 25
    assert choose_size(curve, good(1, 10, 20, 40)) == 20
    assert choose_size(curve, good(1, 5, 10)) == 10  # none is fast enough
    assert choose_size(CostCurve(1.0, 0.0), good(*SIZES)) == 1
    assert choose_size(CostCurve(0.0, 1.0), good(*SIZES)) == 200


def test_a_size_that_does_harm_is_not_chosen() -> None:
    curve = CostCurve(1.0, 2.0)
    poor = [
        BatchQuality(25, 0.97, 1.0),
        BatchQuality(50, 1.0, 0.985),
        BatchQuality(100, 0.99, 0.99),
    ]
    assert choose_size(curve, [*good(1), *poor]) == 100
    assert choose_size(curve, [*good(1, 5), *poor[:2]]) == 5


def test_when_no_size_is_good_at_both_the_least_loss_counts() -> None:
    curve = CostCurve(1.0, 0.0)
    tried = [BatchQuality(1, 1.0, 0.5), BatchQuality(10, 0.8, 0.9), BatchQuality(100, 0.5, 1.0)]
    assert choose_size(curve, tried) == 10


def test_without_neighbours_reliability_decides() -> None:
    tried = [BatchQuality(1, 0.5, None), BatchQuality(10, 1.0, None)]
    assert choose_size(CostCurve(1.0, 0.0), tried) == 10
    with pytest.raises(ValueError, match="tried"):
        choose_size(CostCurve(1.0, 0.0), [])
