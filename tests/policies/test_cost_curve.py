import random

import pytest

from policies.cost_curve import CostCurve, fit_curve

SIZES = (1, 5, 10, 25, 50, 100, 200)


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
    with pytest.raises(ValueError, match="no observations"):
        fit_curve([])
