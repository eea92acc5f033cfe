"""Numbers about the weights as they are now, against the base. What they mean is policy."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from memory.generate import equally_long
from memory.ledger import canonical
from memory.model import EditableModel

MAX_TOKENS = 128


@dataclass(frozen=True)
class Health:
    """What an audit measures. Maps are by layer; ratios are to the unedited model."""

    norm_ratio: dict[str, float]  # ‖W‖_F / ‖W0‖_F
    update_norm: dict[str, float]  # ‖W − W0‖_F
    activation_ratio: dict[str, float]  # E‖y‖ on the canary text
    perplexity: float
    perplexity_ratio: float
    agreement: float  # share of the statements that go on with the same token as the base's
    kl: float  # KL(base ‖ now) of the next token after a statement, in nats, their mean
    finite: bool  # no NaN and no infinity, in these figures or in an edited matrix

    def as_dict(self) -> dict[str, object]:
        """JSON-ready, numbers that are not finite as text."""
        ready: dict[str, object] = json.loads(canonical(asdict(self)))
        return ready


@dataclass(frozen=True)
class Baseline:
    """The unedited model on the canary."""

    activations: dict[int, float]
    perplexity: float
    completed: tuple[int, ...]  # the likeliest token after each statement


class Canary:
    """What the model's health is read on: ordinary text, and statements that want one word more.

    An edit moves other facts sooner than the run of ordinary text: the statements show it first.
    """

    def __init__(
        self,
        model: EditableModel,
        lines: Sequence[str],
        layers: Sequence[int],
        statements: Sequence[str] = (),
    ) -> None:
        self.model, self.layers = model, tuple(layers)
        self._rows = [ids for line in lines if len(ids := model.encode(line)[:MAX_TOKENS]) > 8]
        self._asked = [model.encode(statement) for statement in statements]
        with model.at_base():
            said = list(self.endings())  # on the model's device: (statements, vocabulary) in all
            completed = tuple(n for logits in said for n in logits.argmax(-1).tolist())
            self.baseline = Baseline(*self.read(self.layers), completed)
        self._said = [logits.log_softmax(-1) for logits in said]

    def read(self, layers: Sequence[int]) -> tuple[dict[int, float], float]:
        """Mean output norm of each of the layers on the text, and perplexity per token."""
        norms = dict.fromkeys(layers, 0.0)
        loss, count = 0.0, 0

        def watch(layer: int, _inputs: Tensor, outputs: Tensor) -> None:
            norms[layer] += float(outputs[0, 1:].norm(dim=1).sum())

        taps = {n: partial(watch, n) for n in layers}
        with torch.no_grad(), self.model.tap(taps):
            for ids in self._rows:
                tokens = torch.tensor([ids], device=self.model.device)
                out = self.model.model(input_ids=tokens, labels=tokens, use_cache=False)
                loss += float(out.loss) * (len(ids) - 1)
                count += len(ids) - 1
        if not count:
            return dict.fromkeys(layers, 0.0), math.nan
        mean = loss / count
        perplexity = math.exp(mean) if mean < 700 else math.inf
        return {n: v / count for n, v in norms.items()}, perplexity

    def endings(self) -> Iterator[Tensor]:
        """Next-token logits (rows, vocabulary) at the statements' ends, in float32; statements of
        one length run together."""
        for places in equally_long(self._asked):
            ids = torch.tensor([self._asked[n] for n in places], device=self.model.device)
            with torch.no_grad():
                out = self.model.model(input_ids=ids, use_cache=False, logits_to_keep=1)
            yield out.logits[:, -1].float()

    def _compared(self) -> tuple[float, float]:
        """Agreement with the base at the statements' ends, and the mean KL(base ‖ now)."""
        if not self._asked:
            return 1.0, 0.0
        completed: list[int] = []
        divergence = 0.0
        for base, logits in zip(self._said, self.endings(), strict=True):
            completed += logits.argmax(-1).tolist()
            share = base.exp()
            lost = share * (base - logits.log_softmax(-1))
            divergence += float(lost.where(share > 0, 0).double().sum().clamp(min=0))
        pairs = zip(completed, self.baseline.completed, strict=True)
        same = sum(now == base for now, base in pairs)
        return same / len(completed), divergence / len(completed)

    def measure(self) -> Health:
        """The figures of the model as it is now."""
        activations, perplexity = self.read(self.layers)
        agreement, kl = self._compared()
        ratios, updates = {}, {}
        for layer in self.layers:
            weight, base = self.model.weight(layer), self.model.base_weight(layer)
            ratios[str(layer)] = float(weight.norm() / base.norm())
            updates[str(layer)] = float((weight - base).norm())
        moved = {
            str(n): activations[n] / self.baseline.activations[n]
            for n in self.layers
            if self.baseline.activations[n]
        }
        # A NaN or an infinity anywhere in a matrix is one in its norm.
        numbers = [*ratios.values(), *updates.values(), *moved.values(), perplexity, kl]
        return Health(
            norm_ratio=ratios,
            update_norm=updates,
            activation_ratio=moved,
            perplexity=perplexity,
            perplexity_ratio=perplexity / self.baseline.perplexity,
            agreement=agreement,
            kl=kl,
            finite=all(math.isfinite(n) for n in numbers),
        )
