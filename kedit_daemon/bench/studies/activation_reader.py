"""Activations of a model that reads ordinary text, and statements that lack their last word."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kedit_daemon.editing.model_loading import CanaryTexts, read_canary_texts
from memory.model.canary import MAX_LINE_TOKENS
from memory.model.editable import EditableModel
from memory.model.generate import Overlay, group_by_length


@dataclass(frozen=True)
class Activations:
    """Means over the text's tokens, without each line's first, and the ends of the statements.

    mlp_norms: ‖y‖ by layer, of the MLP's output. stream_norms: ‖h‖ of the residual stream after
    each block but the last, which a model returns only past its final norm. statement_ends: by
    block, the stream at the statements' ends (statements, hidden); the last past the final norm.
    """

    mlp_norms: tuple[float, ...]
    stream_norms: tuple[float, ...]
    perplexity: float
    statement_ends: tuple[Tensor, ...]

    @property
    def is_finite(self) -> bool:
        """Check that there is no NaN and no Inf."""
        numbers = (*self.mlp_norms, *self.stream_norms, self.perplexity)
        ends = all(bool(each.isfinite().all()) for each in self.statement_ends)
        return all(map(math.isfinite, numbers)) and ends


class ActivationReader:
    """Reads the canary's text and statements, with or without an overlay on the weights."""

    def __init__(self, model: EditableModel, texts: CanaryTexts | None = None) -> None:
        self.model, texts = model, texts or read_canary_texts()
        self._text_rows = [
            ids for t in texts.lines if len(ids := model.encode(t)[:MAX_LINE_TOKENS]) > 8
        ]
        self._statement_rows = [model.encode(statement) for statement in texts.statements]

    def read_activations(self, overlay: Overlay | None) -> Activations:
        """Read the activations of the current model."""
        layers, count, loss = range(self.model.layer_count), 0, 0.0
        written, stream = [0.0] * len(layers), [0.0] * (len(layers) - 1)

        def add_lengths(layer: int, _inputs: Tensor, outputs: Tensor) -> None:
            written[layer] += _sum_lengths(outputs)

        taps = {n: partial(add_lengths, n) for n in layers}
        for ids in self._text_rows:
            tokens = torch.tensor([ids], device=self.model.device)
            with torch.no_grad(), _apply_overlay(overlay, [0]), self.model.tap_layers(taps):
                out = self.model.hf_model(
                    input_ids=tokens, labels=tokens, use_cache=False, output_hidden_states=True
                )
            loss += float(out.loss) * (len(ids) - 1)
            count += len(ids) - 1
            for n, after in enumerate(out.hidden_states[1:-1]):
                stream[n] += _sum_lengths(after)
        mean = loss / count
        return Activations(
            tuple(n / count for n in written),
            tuple(n / count for n in stream),
            math.exp(mean) if mean < 700 else math.inf,  # also for NaN
            self._read_ends(overlay),
        )

    def _read_ends(self, overlay: Overlay | None) -> tuple[Tensor, ...]:
        """Read the statements' ends, with statements of one length in one batch."""
        ends: dict[int, list[Tensor]] = {}
        for places in group_by_length(self._statement_rows):
            ids = torch.tensor([self._statement_rows[n] for n in places], device=self.model.device)
            with torch.no_grad(), _apply_overlay(overlay, places):
                out = self.model.hf_model(
                    input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1
                )
            for row, place in enumerate(places):
                ends[place] = [after[row, -1] for after in out.hidden_states[1:]]
        return tuple(
            torch.stack([ends[n][block] for n in sorted(ends)])
            for block in range(self.model.layer_count)
        )


def _sum_lengths(vectors: Tensor) -> float:
    """Sum the lengths of vectors (1, tokens, hidden), without the first token's."""
    return float(vectors[0, 1:].norm(dim=1).sum())


def _apply_overlay(overlay: Overlay | None, places: list[int]) -> AbstractContextManager[object]:
    return overlay(places) if overlay else nullcontext()
