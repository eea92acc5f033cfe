"""What goes through a model that reads: ordinary text, and statements that want one word more."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kedit_daemon.editing.model_loading import read_canary_lines
from kedit_daemon.shipped import read_statements
from memory.model.canary import MAX_LINE_TOKENS
from memory.model.editable import EditableModel
from memory.model.generate import Overlay, group_by_length


@dataclass(frozen=True)
class Activations:
    """Means over the tokens of the text but each line's first, and the ends of the statements.

    written: ‖y‖ by layer, of what its MLP gives. stream: ‖h‖ of the residual stream after each
    block but the last, whose output a model gives only past its final norm. ends: by block, the
    stream where the statements end (statements, hidden); the last one past the final norm.
    """

    mlp_norms: tuple[float, ...]
    stream_norms: tuple[float, ...]
    perplexity: float
    statement_ends: tuple[Tensor, ...]

    @property
    def is_finite(self) -> bool:
        """Whether every number is one."""
        numbers = (*self.mlp_norms, *self.stream_norms, self.perplexity)
        ends = all(bool(each.isfinite().all()) for each in self.statement_ends)
        return all(map(math.isfinite, numbers)) and ends


class ActivationReader:
    """The canary's text and statements, read as they are asked: with what lies over the weights."""

    def __init__(self, model: EditableModel) -> None:
        self.model = model
        self._text_rows = [
            ids for t in read_canary_lines() if len(ids := model.encode(t)[:MAX_LINE_TOKENS]) > 8
        ]
        self._statement_rows = [model.encode(statement) for statement in read_statements()]

    def read_activations(self, overlay: Overlay | None) -> Activations:
        """The model as it is now."""
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
            math.exp(mean) if mean < 700 else math.inf,  # NaN is no larger: infinite, too
            self._read_ends(overlay),
        )

    def _read_ends(self, overlay: Overlay | None) -> tuple[Tensor, ...]:
        """Statements of one length run together."""
        found: dict[int, list[Tensor]] = {}
        for places in group_by_length(self._statement_rows):
            ids = torch.tensor([self._statement_rows[n] for n in places], device=self.model.device)
            with torch.no_grad(), _apply_overlay(overlay, places):
                out = self.model.hf_model(
                    input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1
                )
            for row, place in enumerate(places):
                found[place] = [after[row, -1] for after in out.hidden_states[1:]]
        return tuple(
            torch.stack([found[n][block] for n in sorted(found)])
            for block in range(self.model.layer_count)
        )


def _sum_lengths(vectors: Tensor) -> float:
    """The sum of the lengths of (1, tokens, hidden), without the first token's."""
    return float(vectors[0, 1:].norm(dim=1).sum())


def _apply_overlay(overlay: Overlay | None, places: list[int]) -> AbstractContextManager[object]:
    return overlay(places) if overlay else nullcontext()
