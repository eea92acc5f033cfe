import pytest
import torch
from torch import Tensor

from policies.divergence import FAR_MOVED, Seen, Watch, too_far

GOOD = Seen(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 0]), torch.tensor([5.0, 6.0, 7.0]))


def parameter(*gradients: float) -> Tensor:
    held = torch.zeros(len(gradients), 1, 2)
    held.grad = torch.tensor(gradients, dtype=torch.float)[:, None, None].repeat(1, 1, 2)
    return held


def changed(values: Tensor, fact: int, value: float) -> Tensor:
    values = values.clone()
    values[fact] = value
    return values


def test_of_facts_in_range_all_go_on() -> None:
    watch = Watch(3)
    assert watch.see(1, GOOD, (parameter(1, 1, 1),)) == (2.0, False)
    assert (watch.going, watch.refused) == ([0, 1, 2], {})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_that_is_not_finite_stops_its_fact_and_counts_no_more(value: float) -> None:
    watch = Watch(3)
    seen = Seen(changed(GOOD.losses, 1, value), GOOD.wrong, GOOD.moved)
    assert watch.see(4, seen, (parameter(1, 1, 1),)) == (2.0, True)
    assert watch.going == [0, 2]
    reason = f"the loss is {value:g}, and has to be finite, at step 4"
    assert {n: one.reason for n, one in watch.refused.items()} == {1: reason}
    watch.see(5, GOOD, (parameter(1, 1, 1),))
    assert watch.going == [0, 2]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e25])
def test_a_gradient_in_any_parameter_that_is_not_finite_in_squares_stops_its_fact(
    value: float,
) -> None:
    watch = Watch(3)
    watch.see(2, GOOD, (parameter(1, 1, 1), parameter(1, 1, value)))
    assert watch.going == [0, 1]
    assert watch.refused[2].reason.startswith("the loss's gradient is ")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1.01 * FAR_MOVED])
def test_a_delta_that_moves_too_much_stops_its_fact(value: float) -> None:
    watch = Watch(3)
    seen = Seen(GOOD.losses, GOOD.wrong, changed(GOOD.moved, 0, value))
    assert watch.see(3, seen, (parameter(1, 1, 1),))[0] == 2.5
    assert watch.refused[0].reason == f"{too_far(value)}, at step 3"
    assert f"by {value:.4g} median lengths, more than {FAR_MOVED:g}" in str(too_far(value))


def test_a_delta_may_move_as_much_as_the_limit() -> None:
    assert too_far(FAR_MOVED) is None
