"""Numbers about the weights as they are now, against the base. What they mean is policy."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import torch
from torch import Tensor

from memory.db.event_log import canonical
from memory.model.editable import EditableModel
from memory.model.generate import equally_long

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
class Seen:
    """What a model shows on the canary. Lists and keys are by layer, of every layer."""

    norms: dict[int, float]  # E‖y‖ on the text
    perplexity: float
    completed: tuple[int, ...]  # the likeliest token after each statement
    kl: float  # KL(base ‖ this model) of the next token there, in nats, their mean
    ends: tuple[Tensor, ...] = field(compare=False)  # y (statements, hidden) there


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
        # The base's log-probabilities (rows, vocabulary) at the statements' ends, on its device.
        self._said: list[Tensor] = []
        with model.at_base():
            self.baseline = self.seen = self._look()

    def _look(self) -> Seen:
        """What the model shows now: two passes, over the text and over the statements."""
        ends: list[list[Tensor]] = [[] for _ in range(self.model.layers)]

        def watch(layer: int, _inputs: Tensor, outputs: Tensor) -> None:
            ends[layer].append(outputs[:, -1].clone())  # a slice would keep all tokens

        norms, perplexity = self._read()
        with self.model.tap({n: partial(watch, n) for n in range(self.model.layers)}):
            completed, kl = self._complete()
        nothing = torch.empty(0, self.model.hidden, device=self.model.device)
        rows = tuple(torch.cat([nothing, *parts]) for parts in ends)
        return Seen(norms, perplexity, completed, kl, rows)

    def _read(self) -> tuple[dict[int, float], float]:
        """Mean output norm of each layer on the text, and perplexity per token."""
        norms = dict.fromkeys(range(self.model.layers), 0.0)
        loss, count = 0.0, 0

        def watch(layer: int, _inputs: Tensor, outputs: Tensor) -> None:
            norms[layer] += float(outputs[0, 1:].norm(dim=1).sum())

        with torch.no_grad(), self.model.tap({n: partial(watch, n) for n in norms}):
            for ids in self._rows:
                tokens = torch.tensor([ids], device=self.model.device)
                out = self.model.model(input_ids=tokens, labels=tokens, use_cache=False)
                loss += float(out.loss) * (len(ids) - 1)
                count += len(ids) - 1
        if not count:
            return norms, math.nan
        mean = loss / count
        perplexity = math.exp(mean) if mean < 700 else math.inf
        return {n: v / count for n, v in norms.items()}, perplexity

    def _endings(self) -> Iterator[Tensor]:
        """Next-token logits (rows, vocabulary) at the statements' ends, in float32; statements of
        one length run together."""
        for places in equally_long(self._asked):
            ids = torch.tensor([self._asked[n] for n in places], device=self.model.device)
            with torch.no_grad():
                out = self.model.model(input_ids=ids, use_cache=False, logits_to_keep=1)
            yield out.logits[:, -1].float()

    def _complete(self) -> tuple[tuple[int, ...], float]:
        """The likeliest token after each statement, and the mean KL(base ‖ now) there."""
        found: list[int] = []
        total = 0.0
        for group, logits in enumerate(self._endings()):
            found += logits.argmax(-1).tolist()
            now = logits.log_softmax(-1)
            if group == len(self._said):  # the first look is at the base
                self._said.append(now)
            base, share = self._said[group], self._said[group].exp()
            lost = (share * (base - now)).where(share > 0, 0)
            total += float(lost.double().sum().clamp(min=0))
        return tuple(found), total / max(len(found), 1)

    def _agreement(self, completed: Sequence[int]) -> float:
        pairs = zip(completed, self.baseline.completed, strict=True)
        same = [now == base for now, base in pairs]
        return sum(same) / len(same) if same else 1.0

    def measure(self) -> Health:
        """The figures of the model as it is now. What they come from stays in `seen` until the
        next time."""
        seen = self.seen = self._look()
        ratios, updates = {}, {}
        for layer in self.layers:
            weight, base = self.model.weight(layer), self.model.base_weight(layer)
            ratios[str(layer)] = float(weight.norm() / base.norm())
            updates[str(layer)] = float((weight - base).norm())
        was = self.baseline.norms
        moved = {str(n): seen.norms[n] / was[n] for n in self.layers if was[n]}
        # A NaN or an infinity anywhere in a matrix is one in its norm.
        numbers = [*ratios.values(), *updates.values(), *moved.values(), seen.perplexity, seen.kl]
        return Health(
            norm_ratio=ratios,
            update_norm=updates,
            activation_ratio=moved,
            perplexity=seen.perplexity,
            perplexity_ratio=seen.perplexity / self.baseline.perplexity,
            agreement=self._agreement(seen.completed),
            kl=seen.kl,
            finite=all(math.isfinite(n) for n in numbers),
        )
