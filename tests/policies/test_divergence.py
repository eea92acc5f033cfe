from dataclasses import replace

import pytest
import torch
from torch import Tensor

from policies.divergence import (
    MAX_OUTPUT_SHIFT,
    DivergenceWatch,
    StepReadings,
    check_output_shift,
    stop_non_finite,
)

GOOD = StepReadings(
    torch.tensor([1.0, 2.0, 3.0]),
    torch.tensor([0.5, 1.0, 1.5]),
    torch.tensor([0, 1, 0]),
    torch.tensor([5.0, 6.0, 7.0]),
)


def parameter(*gradients: float) -> Tensor:
    held = torch.zeros(len(gradients), 1, 2)
    held.grad = torch.tensor(gradients, dtype=torch.float)[:, None, None].repeat(1, 1, 2)
    return held


def changed(values: Tensor, fact: int, value: float) -> Tensor:
    values = values.clone()
    values[fact] = value
    return values


def test_of_facts_in_range_all_go_on() -> None:
    watch = DivergenceWatch(3)
    assert watch.check_step(1, GOOD, (parameter(1, 1, 1),)) == (1.0, False)
    assert (watch.active_facts, watch.refusals) == ([0, 1, 2], {})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_loss_that_is_not_finite_stops_its_fact_and_counts_no_more(value: float) -> None:
    watch = DivergenceWatch(3)
    seen = replace(GOOD, losses=changed(GOOD.losses, 1, value))
    assert watch.check_step(4, seen, (parameter(1, 1, 1),)) == (1.0, True)
    assert watch.active_facts == [0, 2]
    reason = f"the loss is {value:g}, and has to be finite, at step 4"
    assert {n: one.reason for n, one in watch.refusals.items()} == {1: reason}
    watch.check_step(5, GOOD, (parameter(1, 1, 1),))
    assert watch.active_facts == [0, 2]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e25])
def test_a_gradient_in_any_parameter_that_is_not_finite_in_squares_stops_its_fact(
    value: float,
) -> None:
    watch = DivergenceWatch(3)
    watch.check_step(2, GOOD, (parameter(1, 1, 1), parameter(1, 1, value)))
    assert watch.active_facts == [0, 1]
    assert watch.refusals[2].reason.startswith("the loss's gradient is ")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1.01 * MAX_OUTPUT_SHIFT])
def test_a_delta_that_moves_too_much_stops_its_fact(value: float) -> None:
    watch = DivergenceWatch(3)
    seen = replace(GOOD, output_shifts=changed(GOOD.output_shifts, 0, value))
    assert watch.check_step(3, seen, (parameter(1, 1, 1),))[0] == 1.25
    assert watch.refusals[0].reason == f"{check_output_shift(value)}, at step 3"
    assert f"by {value:.4g} median lengths, more than {MAX_OUTPUT_SHIFT:g}" in str(
        check_output_shift(value)
    )


def test_a_delta_may_move_as_much_as_the_limit() -> None:
    assert check_output_shift(MAX_OUTPUT_SHIFT) is None


def test_a_gradient_that_is_not_finite_goes_back_to_no_row() -> None:
    # In bfloat16 on some CPUs a product over 31 numbers reads a 32nd, which is the next row's.
    hidden = torch.ones(6, 3, 8, requires_grad=True)
    head = torch.ones(31, 8)
    with torch.autocast("cpu", torch.bfloat16):
        logits = stop_non_finite(torch.nn.functional.linear(hidden, head).float())
    weights = torch.ones(6, 1, 1)
    weights[3] = torch.nan
    (logits * weights).sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad[[0, 1, 2, 4, 5]], torch.full((5, 3, 8), 31.0))
    assert torch.equal(hidden.grad[3], torch.zeros(3, 8))
