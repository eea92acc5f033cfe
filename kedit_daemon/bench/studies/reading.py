"""What goes through a model that reads: ordinary text, and statements that want one word more."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kedit_daemon.editing.model_loading import canary_text
from kedit_daemon.shipped import read_statements
from memory.model.canary import MAX_TOKENS
from memory.model.editable import EditableModel
from memory.model.generate import Overlay, equally_long


@dataclass(frozen=True)
class Reading:
    """Means over the tokens of the text but each line's first, and the ends of the statements.

    written: ‖y‖ by layer, of what its MLP gives. stream: ‖h‖ of the residual stream after each
    block but the last, whose output a model gives only past its final norm. ends: by block, the
    stream where the statements end (statements, hidden); the last one past the final norm.
    """

    written: tuple[float, ...]
    stream: tuple[float, ...]
    perplexity: float
    ends: tuple[Tensor, ...]

    @property
    def finite(self) -> bool:
        """Whether every number is one."""
        numbers = (*self.written, *self.stream, self.perplexity)
        ends = all(bool(each.isfinite().all()) for each in self.ends)
        return all(map(math.isfinite, numbers)) and ends


class Reader:
    """The canary's text and statements, read as they are asked: with what lies over the weights."""

    def __init__(self, model: EditableModel) -> None:
        self.model = model
        self._rows = [ids for t in canary_text() if len(ids := model.encode(t)[:MAX_TOKENS]) > 8]
        self._asked = [model.encode(statement) for statement in read_statements()]

    def read(self, overlay: Overlay | None) -> Reading:
        """The model as it is now."""
        layers, count, loss = range(self.model.layers), 0, 0.0
        written, stream = [0.0] * len(layers), [0.0] * (len(layers) - 1)

        def watch(layer: int, _inputs: Tensor, outputs: Tensor) -> None:
            written[layer] += _length(outputs)

        taps = {n: partial(watch, n) for n in layers}
        for ids in self._rows:
            tokens = torch.tensor([ids], device=self.model.device)
            with torch.no_grad(), _laid(overlay, [0]), self.model.tap(taps):
                out = self.model.model(
                    input_ids=tokens, labels=tokens, use_cache=False, output_hidden_states=True
                )
            loss += float(out.loss) * (len(ids) - 1)
            count += len(ids) - 1
            for n, after in enumerate(out.hidden_states[1:-1]):
                stream[n] += _length(after)
        mean = loss / count
        return Reading(
            tuple(n / count for n in written),
            tuple(n / count for n in stream),
            math.exp(mean) if mean < 700 else math.inf,  # NaN is no larger: infinite, too
            self._ends(overlay),
        )

    def _ends(self, overlay: Overlay | None) -> tuple[Tensor, ...]:
        """Statements of one length run together."""
        found: dict[int, list[Tensor]] = {}
        for places in equally_long(self._asked):
            ids = torch.tensor([self._asked[n] for n in places], device=self.model.device)
            with torch.no_grad(), _laid(overlay, places):
                out = self.model.model(
                    input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1
                )
            for row, place in enumerate(places):
                found[place] = [after[row, -1] for after in out.hidden_states[1:]]
        return tuple(
            torch.stack([found[n][block] for n in sorted(found)])
            for block in range(self.model.layers)
        )


def _length(vectors: Tensor) -> float:
    """The sum of the lengths of (1, tokens, hidden), without the first token's."""
    return float(vectors[0, 1:].norm(dim=1).sum())


def _laid(overlay: Overlay | None, places: list[int]) -> AbstractContextManager[object]:
    return overlay(places) if overlay else nullcontext()
