"""The side memory over a whole text: behind each of its tokens it does what it would do if the text
ended there and went on as it does. Facts that fire within a chat's reply are left out."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from memory.side.row_state import FiredFact, RowState
from memory.side.shards import RoutingMatch
from memory.side.side_memory import SideMemory


class TextOverlay:
    """One text under a side memory. A shard changes what leaves the side layer, and so nothing that
    decides: one pass tells all."""

    def __init__(self, side: SideMemory) -> None:
        self.side = side
        self.fired: list[tuple[int, RoutingMatch]] = []
        """The facts that fired, with the number of the token behind which each did."""

    @contextmanager
    def follow_pass(self, ids: Sequence[int]) -> Iterator[None]:
        """Serve the pass of a text, alone in its batch."""
        side, key_outputs = self.side, list[Tensor]()
        text = side.read_text(ids)
        if not side.unnamed_facts and not side.subject_matcher.may_name(text):
            yield
            return

        def keep_key_outputs(_inputs: Tensor, outputs: Tensor) -> None:
            key_outputs.append(outputs[0])

        def change(inputs: Tensor, outputs: Tensor) -> Tensor:
            return self._change_outputs(ids, key_outputs.pop(), inputs[0], outputs[0])[None]

        with side.model.tap_layers({side.gates.key_layer: keep_key_outputs, side.layer: change}):
            yield

    def _change_outputs(
        self, ids: Sequence[int], key_outputs: Tensor, inputs: Tensor, outputs: Tensor
    ) -> Tensor:
        """Return the side layer's outputs (tokens, hidden) with the shards that fire."""
        changed, row = outputs.clone(), None
        for n, token in enumerate(ids):
            if row is not None:
                row.add_token(token)
            if row is None or row.delta is None:
                row = self._start_row(ids[: n + 1], key_outputs[: n + 1], inputs[n], outputs[n])
            if row is not None and row.delta is not None:
                changed[n] += row.boost * row.delta.apply_to(inputs[n])
        return changed

    def _start_row(
        self, ids: Sequence[int], key_outputs: Tensor, inputs: Tensor, outputs: Tensor
    ) -> RowState | None:
        """Return the row of a fact that fires behind the last of some tokens."""
        side = self.side
        reading = side.read_prompt(ids)
        if not reading.named and not side.unnamed_facts:
            return None
        matches = side.route_row(reading, key_outputs, inputs, outputs)
        if not matches:
            return None
        match = matches[0]
        self.fired.append((len(ids) - 1, match))
        delta, target = side.shards[match.shard_id].delta, side.targets[match.fact_id]
        row = RowState(reading, side.model.decode)
        row.fire(FiredFact(match, delta, target, match.boost))
        return row
