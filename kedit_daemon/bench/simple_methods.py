"""The controls: no edit at all, the fact in the prompt, plain fine-tuning, LoRA."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kedit_daemon.bench.method import Method, Setup
from kedit_daemon.bench.scoring import target_losses
from memory.facts import Fact
from policies.prompts import pad, rows_of

FT_STEPS = 25
FT_RATE = 0.03  # Adam's, in units of the root mean square of W0
LORA_RANK = 8


class Unedited(Method):
    """The model as it came."""

    def edit(self, facts: Sequence[Fact]) -> None:
        """Leave everything as it is."""
        self.not_edited += len(facts)


class InContext(Method):
    """The upper bound without routing: each fact stands before the questions about it."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self._kept = 0

    def edit(self, facts: Sequence[Fact]) -> None:
        """Keep the facts' sentences."""
        self._kept += sum(len(_sentence(fact).encode()) for fact in facts)

    def framed(self, fact: Fact, prompt: str) -> str:
        """The fact, then the prompt: also before neighbours, which shall not mind it."""
        return f"{_sentence(fact)} {prompt}"

    def stored_bytes(self) -> int:
        """The sentences alone."""
        return self._kept


def _sentence(fact: Fact) -> str:
    return f"{fact.question} {fact.target}."


class FineTuning(Method):
    """Adam on one down projection, batch after batch; the targets end with an end of text."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.layer = self.loaded.site.layers[-1]
        self.delta = torch.zeros_like(self.model.base_weight(self.layer))

    def edit(self, facts: Sequence[Fact]) -> None:
        """A fixed number of steps on the whole batch."""
        free = self.delta.clone().requires_grad_()
        self._train(facts, [free], lambda inputs: inputs @ free.T)
        self._put(free.detach())

    def _train(
        self, facts: Sequence[Fact], free: list[Tensor], moved: Callable[[Tensor], Tensor]
    ) -> None:
        """Adam on the free tensors; `moved` is what they and all before make of inputs."""
        rows = [rows_of(self.model, fact)[0] for fact in facts]  # the prompt alone, and the target
        width = max(len(row.ids) for row in rows)
        batch = pad(rows, width, self.model.end or 0, self.model.device)
        rate = FT_RATE * float(self.model.base_weight(self.layer).square().mean().sqrt())
        optimiser = torch.optim.Adam(free, lr=rate)

        def tap(inputs: Tensor, outputs: Tensor) -> Tensor:
            return outputs + moved(inputs)

        with self.watch.part("steps"), self.model.at_base(), self.model.tap({self.layer: tap}):
            for _ in range(FT_STEPS):
                logits = self.model.model(input_ids=batch.ids, use_cache=False).logits
                loss = target_losses(logits, rows).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()

    def _put(self, delta: Tensor) -> None:
        self.delta = delta
        self.model.set_deltas({self.layer: delta})


class Lora(FineTuning):
    """The same with ΔW = B A of low rank (Hu et al. 2021): new ones for every batch, merged into
    the weights after it."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.random = torch.Generator().manual_seed(setup.seed)

    def edit(self, facts: Sequence[Fact]) -> None:
        """A fixed number of steps on the whole batch, from B = 0 on."""
        hidden, width = self.delta.shape
        # of such a length that an entry of B A is about as large as one of B: one rate fits both
        start = torch.randn(LORA_RANK, width, generator=self.random) / LORA_RANK**0.5
        down = start.to(self.delta).requires_grad_()  # A (rank, width)
        up = self.delta.new_zeros(hidden, LORA_RANK, requires_grad=True)  # B (hidden, rank)
        merged = self.delta
        self._train(facts, [up, down], lambda k: k @ merged.T + k @ down.T @ up.T)
        self._put(merged + (up @ down).detach())
