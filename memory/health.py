"""Numbers about the weights as they are now, against the base. What they mean is policy."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

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
    agreement: float  # share of the canary's tokens after which the likeliest one is the base's
    finite: bool

    def as_dict(self) -> dict[str, object]:
        """JSON-ready, numbers that are not finite as text."""
        ready: dict[str, object] = json.loads(canonical(asdict(self)))
        return ready


@dataclass(frozen=True)
class Baseline:
    """The unedited model on the canary text."""

    activations: dict[int, float]
    perplexity: float
    likeliest: tuple[tuple[int, ...], ...]  # next tokens, by line


class Canary:
    """A fixed text on which the model's health is read."""

    def __init__(self, model: EditableModel, lines: Sequence[str], layers: Sequence[int]) -> None:
        self.model, self.layers = model, tuple(layers)
        self._rows = [ids for line in lines if len(ids := model.encode(line)[:MAX_TOKENS]) > 8]
        with model.at_base():
            self.baseline = Baseline(*self._read())

    def _read(self) -> tuple[dict[int, float], float, tuple[tuple[int, ...], ...]]:
        """Mean output norm of each layer, perplexity per token, and the likeliest tokens."""
        norms = dict.fromkeys(self.layers, 0.0)
        likeliest: list[tuple[int, ...]] = []
        loss, count = 0.0, 0

        def watch(layer: int, _inputs: Tensor, outputs: Tensor) -> None:
            norms[layer] += float(outputs[0, 1:].norm(dim=1).sum())

        taps = {n: partial(watch, n) for n in self.layers}
        with torch.no_grad(), self.model.tap(taps):
            for ids in self._rows:
                tokens = torch.tensor([ids], device=self.model.device)
                out = self.model.model(input_ids=tokens, labels=tokens, use_cache=False)
                loss += float(out.loss) * (len(ids) - 1)
                count += len(ids) - 1
                likeliest.append(tuple(out.logits[0, :-1].argmax(-1).tolist()))
        if not count:
            return dict.fromkeys(self.layers, 0.0), math.nan, ()
        mean = loss / count
        perplexity = math.exp(mean) if mean < 700 else math.inf
        return {n: v / count for n, v in norms.items()}, perplexity, tuple(likeliest)

    def _agreement(self, likeliest: tuple[tuple[int, ...], ...]) -> float:
        pairs = zip(likeliest, self.baseline.likeliest, strict=True)
        same = [a == b for now, base in pairs for a, b in zip(now, base, strict=True)]
        return sum(same) / len(same) if same else math.nan

    def measure(self) -> Health:
        """The figures of the model as it is now."""
        activations, perplexity, likeliest = self._read()
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
        numbers = [*ratios.values(), *updates.values(), *moved.values(), perplexity]
        return Health(
            norm_ratio=ratios,
            update_norm=updates,
            activation_ratio=moved,
            perplexity=perplexity,
            perplexity_ratio=perplexity / self.baseline.perplexity,
            agreement=self._agreement(likeliest),
            finite=all(math.isfinite(n) for n in numbers),
        )
