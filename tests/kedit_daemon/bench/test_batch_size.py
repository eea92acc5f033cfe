import pytest

from kedit_daemon.bench.batch_size import BatchQuality, choose_size
from policies.cost_curve import CostCurve

SIZES = (1, 5, 10, 25, 50, 100, 200)


def good(*sizes: int) -> list[BatchQuality]:
    return [BatchQuality(size, 1.0, 1.0) for size in sizes]


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
