"""Baselines: no edit at all, the fact in the prompt, plain fine-tuning, LoRA."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kedit_daemon.bench.methods.method import Method, MethodSetup
from kedit_daemon.bench.scoring import compute_target_losses
from memory.facts import Fact
from policies.prompts import make_rows, pad_rows

FT_STEPS = 25
FT_RATE = 0.03  # Adam's, in units of the root mean square of W0
LORA_RANK = 8


class Unedited(Method):
    """The unedited model."""

    def edit(self, facts: Sequence[Fact]) -> None:
        """Count the facts as not edited."""
        self.not_edited += len(facts)


class InContext(Method):
    """Upper bound without routing: each fact precedes the questions about it in the prompt."""

    def __init__(self, setup: MethodSetup) -> None:
        super().__init__(setup)
        self._stored_bytes = 0

    def edit(self, facts: Sequence[Fact]) -> None:
        """Count the bytes of the facts' sentences."""
        self._stored_bytes += sum(len(_format_sentence(fact).encode()) for fact in facts)

    def frame_prompt(self, fact: Fact, prompt: str) -> str:
        """Put the fact before the prompt, also a neighbour's, whose answer should not change."""
        return f"{_format_sentence(fact)} {prompt}"

    def count_stored_bytes(self) -> int:
        return self._stored_bytes


def _format_sentence(fact: Fact) -> str:
    return f"{fact.statement}."


class FineTuning(Method):
    """Adam on one down projection, batch after batch; targets end with an end-of-text token."""

    def __init__(self, setup: MethodSetup) -> None:
        super().__init__(setup)
        self.layer = self.loaded_model.site.layers[-1]
        self.delta = torch.zeros_like(self.model.base_weight(self.layer))

    def edit(self, facts: Sequence[Fact]) -> None:
        """Take FT_STEPS steps on the whole batch."""
        free = self.delta.clone().requires_grad_()
        self._train_tensors(facts, [free], lambda inputs: inputs @ free.T)
        self._set_delta(free.detach())

    def _train_tensors(
        self, facts: Sequence[Fact], free: list[Tensor], moved: Callable[[Tensor], Tensor]
    ) -> None:
        """Train the free tensors by Adam; `moved(k)` is ΔW k under these and all earlier edits."""
        rows = [make_rows(self.model, fact)[0] for fact in facts]  # the bare prompt, and the target
        width = max(len(row.ids) for row in rows)
        batch = pad_rows(rows, width, self.model.end_token or 0, self.model.device)
        rate = FT_RATE * float(self.model.base_weight(self.layer).square().mean().sqrt())
        optimiser = torch.optim.Adam(free, lr=rate)

        def add_moved(inputs: Tensor, outputs: Tensor) -> Tensor:
            return outputs + moved(inputs)

        with (
            self.stopwatch.time_part("steps"),
            self.model.at_base(),
            self.model.tap_layers({self.layer: add_moved}),
        ):
            for _ in range(FT_STEPS):
                logits = self.model.hf_model(input_ids=batch.ids, use_cache=False).logits
                loss = compute_target_losses(logits, rows).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()

    def _set_delta(self, delta: Tensor) -> None:
        self.delta = delta
        self.model.set_deltas({self.layer: delta})


class Lora(FineTuning):
    """LoRA (Hu et al. 2021): ΔW = B A of low rank for every batch, then merged into the weights."""

    def __init__(self, setup: MethodSetup) -> None:
        super().__init__(setup)
        self.generator = torch.Generator().manual_seed(setup.seed)

    def edit(self, facts: Sequence[Fact]) -> None:
        """Take FT_STEPS steps on the whole batch, starting from B = 0."""
        hidden, width = self.delta.shape
        # Scaled so that entries of B A are about as large as those of B: one rate fits both.
        start = torch.randn(LORA_RANK, width, generator=self.generator) / LORA_RANK**0.5
        down = start.to(self.delta).requires_grad_()  # A (rank, width)
        up = self.delta.new_zeros(hidden, LORA_RANK, requires_grad=True)  # B (hidden, rank)
        merged = self.delta
        self._train_tensors(facts, [up, down], lambda k: k @ merged.T + k @ down.T @ up.T)
        self._set_delta(merged + (up @ down).detach())
