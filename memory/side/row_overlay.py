"""The side memory over the rows of a batch: taps that read where rows may fire, and change those
that do. A row without a match is not touched: its output is unchanged, bit for bit."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor

from memory.side.row_state import FiredFact, PromptReading, RowState
from memory.side.shards import Delta, RoutingMatch
from memory.side.side_memory import SideMemory


class RowOverlay:
    """A batch of rows under a side memory, from their prompts on."""

    def __init__(self, side: SideMemory, rows: Sequence[RowState] = ()) -> None:
        """`rows`: whose prompts were read before."""
        self.side, self.rows = side, list(rows)

    @property
    def matches(self) -> list[RoutingMatch | None]:
        """The fact that fires for each row."""
        return [row.match for row in self.rows]

    @contextmanager
    def follow_passes(self) -> Iterator[None]:
        """Serve the passes of one batch: the first reads the prompts, which must end at their last
        column, and decides for each row; those after it feed one token to each row."""
        self.rows = []
        with ExitStack() as taps:

            def see_ids(ids: Tensor) -> None:
                taps.close()  # those of the pass before
                if self.rows:
                    self.add_tokens(ids[:, -1].tolist())
                    taps.enter_context(self.apply_deltas())
                else:
                    taps.enter_context(self.read_prompts(ids.tolist()))

            with self.side.model.observe_input_ids(see_ids):
                yield

    @contextmanager
    def read_prompts(self, prompts: Sequence[Sequence[int]]) -> Iterator[None]:
        """Serve the pass of prompts of one length, and decide for each row."""
        side = self.side
        readings = [side.read_prompt(ids) for ids in prompts]
        if not side.unnamed_facts and not any(reading.named for reading in readings):
            self.rows = [self._make_row(reading, None) for reading in readings]
            yield
            return
        key_outputs: list[Tensor] = []

        def keep_key_outputs(_inputs: Tensor, outputs: Tensor) -> None:
            key_outputs.append(outputs)

        def decide(inputs: Tensor, outputs: Tensor) -> Tensor | None:
            ends = zip(readings, key_outputs.pop(), inputs[:, -1], outputs[:, -1], strict=True)
            self.rows = [self._start_row(*end) for end in ends]
            deltas = self._list_deltas()
            return _add_deltas(deltas, inputs, outputs) if any(deltas) else None

        with side.model.tap_layers({side.gates.key_layer: keep_key_outputs, side.layer: decide}):
            yield

    def add_tokens(self, tokens: Sequence[int]) -> None:
        """Take the token that each row is fed next."""
        for row, token in zip(self.rows, tokens, strict=True):
            row.add_token(token)

    @contextmanager
    def apply_deltas(self) -> Iterator[None]:
        """Serve a pass over the rows' next tokens; nothing is tapped where no row is active."""
        deltas = self._list_deltas()
        if not any(deltas):
            yield
            return
        with self.side.model.tap_layers({self.side.layer: partial(_add_deltas, deltas)}):
            yield

    def _start_row(
        self, reading: PromptReading, key_outputs: Tensor, inputs: Tensor, outputs: Tensor
    ) -> RowState:
        match = self.side.route_row(reading, key_outputs, inputs, outputs)
        return self._make_row(reading, match)

    def _make_row(self, reading: PromptReading, match: RoutingMatch | None) -> RowState:
        fired = None
        if match is not None:
            delta = self.side.shards[match.shard_id].delta
            fired = FiredFact(match, delta, self.side.targets[match.fact_id])
        return RowState(fired, reading.is_chat, self.side.model.decode)

    def _list_deltas(self) -> list[Delta | None]:
        return [row.delta for row in self.rows]


def _add_deltas(deltas: Sequence[Delta | None], inputs: Tensor, outputs: Tensor) -> Tensor:
    """Add each row's ΔW k to the last token of the side layer's outputs (rows, tokens, hidden)."""
    changed = outputs.clone()
    for n, delta in enumerate(deltas):
        if delta is not None:
            changed[n, -1] += delta.apply_to(inputs[n, -1])
    return changed
