"""Fine-tuning of down projections, plain, regularised and replayed, and continued pretraining."""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from kedit_daemon.bench.methods.gradient_pairs import make_target_row
from kedit_daemon.bench.methods.method import MethodSetup
from kedit_daemon.bench.methods.stacking import StackingMethod
from kedit_daemon.bench.scoring import compute_target_losses
from kedit_daemon.shipped import read_ordinary_lines
from memory.facts import Fact
from memory.model.editable import Tap
from policies.prompts import TokenRow, pad_rows

FT_STEPS = 25
FT_RATE = 0.03  # Adam's, in units of the root mean square of W0
WIDE_RATE = 0.006  # the same where all layers move
LORA_RANK = 8
ANCHOR_WEIGHT = 1.0  # of ‖ΔW‖² / ‖W0‖², beside the facts' loss
DISTIL_WEIGHT = 1.0  # of the divergence on ordinary text
TEXT_ROWS, TEXT_TOKENS = 8, 32  # of ordinary text, for distillation and for pretraining
REPLAYED_FACTS = 16


class FineTuning(StackingMethod):
    """Adam on one down projection, batch after batch; targets end with an end-of-text token."""

    rate = FT_RATE

    def __init__(self, setup: MethodSetup) -> None:
        super().__init__(setup)
        self.layers = self.choose_layers()
        self.start_layers(self.layers)

    def choose_layers(self) -> tuple[int, ...]:
        """Choose the layers to train: the last that the site edits."""
        return self.loaded_model.layers[-1:]

    def choose_rows(self, facts: Sequence[Fact]) -> list[TokenRow]:
        """Choose the rows to train on: the bare prompts, each with its target."""
        return [make_target_row(self.model, fact) for fact in facts]

    def compute_penalty(self, free: Sequence[Tensor]) -> Tensor:
        """Compute what is added to the rows' loss, under the weights that are trained: nothing."""
        return torch.zeros((), device=self.model.device)

    def edit(self, facts: Sequence[Fact]) -> None:
        """Take FT_STEPS steps on the whole batch."""
        free = {n: self.deltas[n].clone().requires_grad_() for n in self.layers}
        moves = {n: partial(_apply_delta, delta) for n, delta in free.items()}
        self.train_tensors(facts, [*free.values()], moves)
        self.replace_deltas({n: delta.detach() for n, delta in free.items()})

    def train_tensors(
        self,
        facts: Sequence[Fact],
        free: Sequence[Tensor],
        moves: Mapping[int, Callable[[Tensor], Tensor]],
    ) -> None:
        """Train the free tensors by Adam. moves: by layer the function of a key k that returns
        ΔW k, under these and all earlier edits."""
        rows = self.choose_rows(facts)
        width = max(len(row.ids) for row in rows)
        batch = pad_rows(rows, width, self.model.end_token or 0, self.model.device)
        scales = [float(self.model.base_weight(n).square().mean().sqrt()) for n in self.layers]
        optimiser = torch.optim.Adam(free, lr=self.rate * sum(scales) / len(scales))
        taps: dict[int, Tap] = {n: partial(_add_moved, move) for n, move in moves.items()}
        with (
            self.stopwatch.time_part("steps"),
            self.model.at_base(),
            self.model.tap_layers(taps),
        ):
            for _ in range(FT_STEPS):
                logits = self.model.hf_model(input_ids=batch.ids, use_cache=False).logits
                loss = compute_target_losses(logits, rows).mean() + self.compute_penalty(free)
                optimiser.zero_grad()
                loss.backward()
                lengths = [tensor.grad.norm() for tensor in free if tensor.grad is not None]
                self.last_gradient = float(torch.stack(lengths).norm())
                optimiser.step()


def _apply_delta(delta: Tensor, keys: Tensor) -> Tensor:
    return keys @ delta.T


def _add_moved(move: Callable[[Tensor], Tensor], inputs: Tensor, outputs: Tensor) -> Tensor:
    return outputs + move(inputs)


class Lora(FineTuning):
    """LoRA (Hu et al. 2021): ΔW = B A of low rank for every batch, then merged into the weights."""

    def __init__(self, setup: MethodSetup) -> None:
        super().__init__(setup)
        self.generator = torch.Generator().manual_seed(setup.seed)

    def edit(self, facts: Sequence[Fact]) -> None:
        """Take FT_STEPS steps on the whole batch, starting from B = 0."""
        (layer,) = self.layers
        merged = self.deltas[layer]
        hidden, width = merged.shape
        # Scaled so that entries of B A are about as large as those of B: one rate fits both.
        start = torch.randn(LORA_RANK, width, generator=self.generator) / LORA_RANK**0.5
        down = start.to(merged).requires_grad_()  # A (rank, width)
        up = merged.new_zeros(hidden, LORA_RANK, requires_grad=True)  # B (hidden, rank)
        move = {layer: lambda k: k @ merged.T + k @ down.T @ up.T}
        self.train_tensors(facts, [up, down], move)
        self.add_updates({layer: (up @ down).detach()})


class AnchoredTuning(FineTuning):
    """Fine-tuning with a weight on ‖ΔW‖², so that W stays near W0."""

    def compute_penalty(self, free: Sequence[Tensor]) -> Tensor:
        bases = [self.model.base_weight(n) for n in self.layers]
        parts = [d.square().sum() / w.square().sum() for d, w in zip(free, bases, strict=True)]
        return ANCHOR_WEIGHT * torch.stack(parts).sum()


class DistilledTuning(FineTuning):
    """Fine-tuning that keeps the unedited model's next tokens on ordinary text."""

    def __init__(self, setup: MethodSetup) -> None:
        super().__init__(setup)
        rows = encode_text(self, TEXT_ROWS)
        self.text_ids = torch.tensor([row.ids for row in rows], device=self.model.device)
        with torch.no_grad(), self.model.at_base():
            self.unedited = self._predict_text()

    def _predict_text(self) -> Tensor:
        """Return log-probabilities (rows · tokens, vocabulary) on the text."""
        logits: Tensor = self.model.hf_model(input_ids=self.text_ids, use_cache=False).logits
        return logits.float().log_softmax(-1).flatten(0, 1)

    def compute_penalty(self, free: Sequence[Tensor]) -> Tensor:
        """Compute the mean KL(unedited ‖ now), weighted."""
        now = self._predict_text()
        kl = F.kl_div(now, self.unedited, log_target=True, reduction="batchmean")
        return DISTIL_WEIGHT * kl


class ReplayedTuning(FineTuning):
    """Fine-tuning on some of the earlier facts beside the new ones."""

    def __init__(self, setup: MethodSetup) -> None:
        super().__init__(setup)
        self.rng, self.earlier = random.Random(setup.seed), list[Fact]()

    def choose_rows(self, facts: Sequence[Fact]) -> list[TokenRow]:
        drawn = self.rng.sample(self.earlier, min(REPLAYED_FACTS, len(self.earlier)))
        self.earlier += facts
        return super().choose_rows([*facts, *drawn])


class WideTuning(FineTuning):
    """Fine-tuning of every down projection."""

    rate = WIDE_RATE

    def choose_layers(self) -> tuple[int, ...]:
        return tuple(range(self.model.layer_count))


class Pretraining(WideTuning):
    """Continued pretraining of every down projection: facts as sentences in ordinary text."""

    def __init__(self, setup: MethodSetup) -> None:
        super().__init__(setup)
        self.text_rows, self.next_row = encode_text(self, None), 0

    def choose_rows(self, facts: Sequence[Fact]) -> list[TokenRow]:
        """Choose a row for each fact, of which every token is predicted, and rows of text."""
        most = self.model.max_positions
        texts = [self.model.encode(f"{fact.statement}.")[:most] for fact in facts]
        rows = [TokenRow(tuple(ids), 1, 0) for ids in texts]
        for _ in range(TEXT_ROWS):
            rows.append(self.text_rows[self.next_row % len(self.text_rows)])
            self.next_row += 1
        return rows


def encode_text(method: FineTuning, count: int | None) -> list[TokenRow]:
    """Encode the starts of the first `count` ordinary lines that are long enough, or of all."""
    encoded = (method.model.encode(line)[:TEXT_TOKENS] for line in read_ordinary_lines())
    rows = [TokenRow(tuple(ids), 1, 0) for ids in encoded if len(ids) == TEXT_TOKENS]
    return rows[:count]
