"""Health figures of the edited model against the base. Their limits are policy."""

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from memory.canonical_json import to_canonical_json
from memory.model.editable import EditableModel
from memory.model.generate import group_by_length

MAX_LINE_TOKENS = 128
# The base completes a statement with confidence from this probability of its likeliest token on.
# Below it any change of the weights, also a rounding, may turn the choice.
CONFIDENT_PROBABILITY = 0.3
MIN_CONFIDENT_STATEMENTS = 30  # a share of fewer is mostly chance
# Passes on items one by one, and shows how many are done.
WrapProgress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Health:
    """Figures of an audit. Maps are by layer; ratios are to the unedited model."""

    norm_ratio: dict[str, float]  # ‖W‖_F / ‖W0‖_F
    update_norm: dict[str, float]  # ‖W − W0‖_F
    activation_ratio: dict[str, float]  # E‖y‖ on the canary text
    perplexity: float
    perplexity_ratio: float
    agreement: float  # share of statements with the same next token as the base's
    kl: float  # mean KL(base ‖ now) of the next token after a statement, in nats
    finite: bool  # no NaN and no infinity, in these figures or in an edited matrix
    # The same as `agreement`, of the statements that the base completes with confidence; None where
    # they are fewer than MIN_CONFIDENT_STATEMENTS.
    confident_agreement: float | None = None
    confident_statements: int = 0  # the number of them

    def as_dict(self) -> dict[str, object]:
        """Convert to JSON values, numbers that are not finite as text."""
        ready: dict[str, object] = json.loads(to_canonical_json(asdict(self)))
        return ready


@dataclass(frozen=True)
class CanaryReadings:
    """Measurements of a model on the canary. Lists and keys are by layer, of every layer."""

    activation_norms: dict[int, float]  # E‖y‖ on the text
    perplexity: float
    next_tokens: tuple[int, ...]  # the likeliest token after each statement
    top_probabilities: tuple[float, ...]  # of these tokens
    kl: float  # mean KL(base ‖ this model) of the next token there, in nats
    end_activations: tuple[Tensor, ...] = field(compare=False)  # y (statements, hidden) there
    # The residual stream (statements, hidden) that leaves the last block there. The probabilities
    # of all tokens follow from it, in a hundredth of their space.
    end_states: Tensor = field(compare=False)


class Canary:
    """Fixed inputs that the model's health is measured on: ordinary text, and statements that lack
    their last word.

    An edit moves other facts sooner than ordinary text: the statements show it first.

    `is_confident` tells of each statement, in the order of the readings, whether the base completes
    it with confidence.
    """

    def __init__(
        self,
        model: EditableModel,
        lines: Sequence[str],
        layers: Sequence[int],
        statements: Sequence[str] = (),
        base_readings: CanaryReadings | None = None,
        progress: WrapProgress = iter,
    ) -> None:
        """`base_readings`: of the unedited model, where they were kept; otherwise it is measured
        now. `progress` wraps what is measured then."""
        self.model, self.layers = model, tuple(layers)
        self._text_rows = [
            ids for line in lines if len(ids := model.encode(line)[:MAX_LINE_TOKENS]) > 8
        ]
        self._statement_rows = [model.encode(statement) for statement in statements]
        if base_readings is None:
            with model.at_base():
                base_readings = self._read_canary(None, progress)
        self.base_readings = self.latest_readings = base_readings
        self.is_confident = tuple(
            p >= CONFIDENT_PROBABILITY for p in base_readings.top_probabilities
        )

    def _read_canary(
        self, base: CanaryReadings | None, progress: WrapProgress = iter
    ) -> CanaryReadings:
        """Measure the model in two passes, over the text and over the statements. `base`: of the
        unedited model, if this is another."""
        ends: list[list[Tensor]] = [[] for _ in range(self.model.layer_count)]
        states: list[Tensor] = []

        def record_end(layer: int, _inputs: Tensor, outputs: Tensor) -> None:
            ends[layer].append(outputs[:, -1].clone())  # a slice would keep all tokens

        norms, perplexity = self._measure_text(progress)
        taps = {n: partial(record_end, n) for n in range(self.model.layer_count)}
        observe = self.model.observe_final_states(lambda found: states.append(found[:, -1].clone()))
        with self.model.tap_layers(taps), observe:
            completed, sure, kl = self._complete_statements(base, progress)
        no_rows = torch.empty(0, self.model.hidden_size, device=self.model.device)
        rows = tuple(torch.cat([no_rows, *parts]) for parts in ends)
        end_states = torch.cat([no_rows, *states])
        return CanaryReadings(norms, perplexity, completed, sure, kl, rows, end_states)

    def _measure_text(self, progress: WrapProgress) -> tuple[dict[int, float], float]:
        """Compute the mean output norm of each layer on the text, and the perplexity per token."""
        norms = dict.fromkeys(range(self.model.layer_count), 0.0)
        loss, count = 0.0, 0

        def add_norms(layer: int, _inputs: Tensor, outputs: Tensor) -> None:
            norms[layer] += float(outputs[0, 1:].norm(dim=1).sum())

        with torch.no_grad(), self.model.tap_layers({n: partial(add_norms, n) for n in norms}):
            for ids in progress(self._text_rows):
                tokens = torch.tensor([ids], device=self.model.device)
                out = self.model.hf_model(input_ids=tokens, labels=tokens, use_cache=False)
                loss += float(out.loss) * (len(ids) - 1)
                count += len(ids) - 1
        if not count:
            return norms, math.nan
        mean = loss / count
        perplexity = math.exp(mean) if mean < 700 else math.inf
        return {n: v / count for n, v in norms.items()}, perplexity

    def _statement_logits(self, progress: WrapProgress) -> Iterator[Tensor]:
        """Yield float32 next-token logits (rows, vocabulary) at the statements' ends, grouped by
        length."""
        for places in progress(group_by_length(self._statement_rows)):
            ids = torch.tensor([self._statement_rows[n] for n in places], device=self.model.device)
            with torch.no_grad():
                out = self.model.hf_model(input_ids=ids, use_cache=False, logits_to_keep=1)
            yield out.logits[:, -1].float()

    def _complete_statements(
        self, base: CanaryReadings | None, progress: WrapProgress
    ) -> tuple[tuple[int, ...], tuple[float, ...], float]:
        """Return the likeliest token after each statement, its probability, and the mean
        KL(base ‖ now) there."""
        tokens, sure = list[int](), list[float]()
        total = 0.0
        for logits in self._statement_logits(progress):
            first = len(tokens)
            tokens += logits.argmax(-1).tolist()
            sure += logits.softmax(-1).amax(-1).tolist()
            if base is not None:
                total += self._sum_divergence(base.end_states[first : len(tokens)], logits)
        return tuple(tokens), tuple(sure), total / max(len(tokens), 1)

    def _sum_divergence(self, base_states: Tensor, logits: Tensor) -> float:
        """Sum KL(base ‖ now) over rows, by the base's states (rows, hidden) that leave the last
        block, and the logits (rows, vocabulary) of now."""
        base = self.model.compute_logits(base_states).float().log_softmax(-1)
        share = base.exp()
        lost = (share * (base - logits.log_softmax(-1))).where(share > 0, 0)
        return float(lost.double().sum().clamp(min=0))

    def measure_health(self, layers: Collection[int] | None = None) -> Health:
        """Measure the model as it is now; `latest_readings` keeps the measurements. `layers`: those
        that are edited, if not the canary's own."""
        seen = self.latest_readings = self._read_canary(self.base_readings)
        edited = self.layers if layers is None else layers
        ratios, updates = {}, {}
        for layer in edited:
            weight, base = self.model.weight(layer), self.model.base_weight(layer)
            ratios[str(layer)] = float(weight.norm() / base.norm())
            updates[str(layer)] = float((weight - base).norm())
        unedited = self.base_readings
        pairs = zip(seen.next_tokens, unedited.next_tokens, strict=True)
        same = [now == token for now, token in pairs]
        sure = [kept for kept, counts in zip(same, self.is_confident, strict=True) if counts]
        before = unedited.activation_norms
        moved = {str(n): seen.activation_norms[n] / before[n] for n in edited if before[n]}
        # A NaN or an infinity anywhere in a matrix makes its norm one.
        numbers = [*ratios.values(), *updates.values(), *moved.values(), seen.perplexity, seen.kl]
        return Health(
            norm_ratio=ratios,
            update_norm=updates,
            activation_ratio=moved,
            perplexity=seen.perplexity,
            perplexity_ratio=seen.perplexity / unedited.perplexity,
            agreement=sum(same) / len(same) if same else 1.0,
            kl=seen.kl,
            finite=all(math.isfinite(n) for n in numbers),
            confident_agreement=(
                sum(sure) / len(sure) if len(sure) >= MIN_CONFIDENT_STATEMENTS else None
            ),
            confident_statements=len(sure),
        )
