"""Divergence of facts that are learned side by side: one that is out of range stops alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from policies.edit_terms import Refusal

# The loss and its gradient only have to be finite: Adam's steps do not grow with the gradient.
# (Of 200 CounterFact facts on the shipped model, the longest of a fact's gradients in B was 5 to 54
# per length, its loss 3 to 13.) The shift of the output at the ends of a fact's prompts, max ‖ΔW a‖
# in lengths, was 5 to 16 for the same facts, half of them below 9, and at no step more than at the
# end.
MAX_OUTPUT_SHIFT = 150.0


@dataclass(frozen=True)
class StepReadings:
    """Readings (facts,) of a step: the loss, the part of it that has to become small, the number of
    target tokens that are not the argmax, and the longest ‖ΔW a‖ at the fact's prompt ends, in
    lengths."""

    losses: Tensor
    open_losses: Tensor
    wrong_tokens: Tensor
    output_shifts: Tensor


class DivergenceWatch:
    """Facts that are learned side by side, by index: those still active, and refusals of others."""

    def __init__(self, facts: int) -> None:
        self.active_facts = list(range(facts))
        self.refusals: dict[int, Refusal] = {}

    def check_step(
        self, step: int, readings: StepReadings, parameters: Sequence[Tensor]
    ) -> tuple[float, bool]:
        """Stop the facts that are out of range, by readings and gradients of (facts, ...).

        Returns the mean open loss of the active facts, and whether all their target tokens are
        argmax.
        """
        squares = [p.grad.square().flatten(1).sum(1) for p in parameters if p.grad is not None]
        lengths = torch.stack(squares).sum(0).sqrt()
        read = (readings.losses, readings.open_losses, readings.wrong_tokens)
        # In one read, which waits for the GPU.
        table = torch.stack([*(t.detach() for t in read), lengths, readings.output_shifts.detach()])
        losses, left, wrong, gradients, shifts = table.tolist()
        for n in tuple(self.active_facts):
            why = (
                _check_finite("loss", losses[n])
                or _check_finite("loss's gradient", gradients[n])
                or check_output_shift(shifts[n])
            )
            if why:
                self.active_facts.remove(n)
                self.refusals[n] = Refusal(f"{why}, at step {step}")
        mean = sum(left[n] for n in self.active_facts) / max(len(self.active_facts), 1)
        return mean, not any(wrong[n] for n in self.active_facts)


def _check_finite(name: str, value: float) -> str | None:
    return None if isfinite(value) else f"the {name} is {value:g}, and has to be finite"


def check_output_shift(shift: float) -> str | None:
    """Return why a ΔW that moves the output at its prompt ends by these lengths is refused, or
    None."""
    if shift <= MAX_OUTPUT_SHIFT:
        return None
    moved = f"the delta moves the output at its prompts' ends by {shift:.4g} median lengths"
    return f"{moved}, more than {MAX_OUTPUT_SHIFT:g}"


def stop_non_finite(logits: Tensor) -> Tensor:
    """Return logits through which no gradient goes back that is not finite.

    A fact's gradient may otherwise spoil that of the rows before its own: products in bfloat16 on a
    CPU read pairs of numbers, and of an odd vocabulary the last pair reaches into the next row.
    """
    if logits.requires_grad:
        logits.register_hook(lambda gradient: gradient.nan_to_num(0.0, 0.0, 0.0))
    return logits
