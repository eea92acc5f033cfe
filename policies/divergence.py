"""What is watched while facts are learned side by side: one that is out of range stops alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from policies.edit_terms import Refusal

# Of the loss and its gradient it is asked that they are finite: Adam's steps do not grow with the
# gradient. (Of 200 CounterFact facts on the shipped model, the longest of a fact's gradients in B
# was 5 to 54 per length, its loss 3 to 13.) How far its ΔW moves the output at the ends of a fact's
# prompts, max ‖ΔW a‖ in lengths, was 5 to 16 for the same facts, half of them below 9, and at no
# step more than in the end.
MAX_OUTPUT_SHIFT = 150.0


@dataclass(frozen=True)
class StepReadings:
    """Of every fact (facts,) at a step: its loss, how many tokens of its target are not the argmax,
    and the longest ‖ΔW a‖ at its prompts' ends, in lengths."""

    losses: Tensor
    wrong_tokens: Tensor
    output_shifts: Tensor


class DivergenceWatch:
    """Facts that are learned side by side, by place: which go on, and why the others do not."""

    def __init__(self, facts: int) -> None:
        self.active_facts = list(range(facts))
        self.refusals: dict[int, Refusal] = {}

    def check_step(
        self, step: int, seen: StepReadings, parameters: Sequence[Tensor]
    ) -> tuple[float, bool]:
        """Stop what is out of range at a step, with gradients in the parameters (facts, ...).

        The mean loss of those that go on, and whether all of their targets' tokens are the argmax.
        """
        squares = [p.grad.square().flatten(1).sum(1) for p in parameters if p.grad is not None]
        lengths = torch.stack(squares).sum(0).sqrt()
        table = torch.stack(
            [seen.losses.detach(), seen.wrong_tokens, lengths, seen.output_shifts.detach()]
        )
        losses, wrong, gradients, moved = table.tolist()  # read at once: a GPU is waited for
        for n in tuple(self.active_facts):
            why = (
                _check_finite("loss", losses[n])
                or _check_finite("loss's gradient", gradients[n])
                or check_output_shift(moved[n])
            )
            if why:
                self.active_facts.remove(n)
                self.refusals[n] = Refusal(f"{why}, at step {step}")
        mean = sum(losses[n] for n in self.active_facts) / max(len(self.active_facts), 1)
        return mean, not any(wrong[n] for n in self.active_facts)


def _check_finite(name: str, value: float) -> str | None:
    return None if isfinite(value) else f"the {name} is {value:g}, and has to be finite"


def check_output_shift(moved: float) -> str | None:
    """Why a ΔW that moves the output at its prompts' ends by so many lengths is refused, if it
    is."""
    if moved <= MAX_OUTPUT_SHIFT:
        return None
    return (
        f"the delta moves the output at its prompts' ends by {moved:.4g} median lengths, more than"
        f" {MAX_OUTPUT_SHIFT:g}"
    )
