"""The side memory over the rows of a batch: taps that read where rows may fire, and change those
that do. A row without a match is not touched: its output is unchanged, bit for bit."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from torch import Tensor

from memory.side.prompt_reader import PromptReading
from memory.side.row_state import FiredFact, RowState
from memory.side.shards import RoutingMatch
from memory.side.side_memory import SideMemory

LIKELY_TOKENS = 64  # that are looked at for the next letters of a word
IMPOSSIBLE_LOGIT = -1e4  # of a probability of 0 at any usual temperature, and finite in JSON


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
            self.rows = [RowState(reading, side.model.decode) for reading in readings]
            yield
            return
        key_outputs: list[Tensor] = []

        def keep_key_outputs(_inputs: Tensor, outputs: Tensor) -> None:
            key_outputs.append(outputs)

        def decide(inputs: Tensor, outputs: Tensor) -> Tensor | None:
            ends = zip(readings, key_outputs.pop(), inputs[:, -1], outputs[:, -1], strict=True)
            self.rows = [self._start_row(*end) for end in ends]
            return _add_deltas(self.rows, inputs, outputs)

        with side.model.tap_layers({side.gates.key_layer: keep_key_outputs, side.layer: decide}):
            yield

    def add_tokens(self, tokens: Sequence[int]) -> None:
        """Take the token that each row is fed next."""
        for row, token in zip(self.rows, tokens, strict=True):
            row.add_token(token)
            if recent := row.recent_tokens:
                row.arm(self.side.find_named(recent))

    @contextmanager
    def apply_deltas(self) -> Iterator[None]:
        """Serve a pass over the rows' next tokens; nothing is tapped where no row is active or
        armed, or has a token to say."""
        with ExitStack() as taps:
            if any(row.forced_token is not None or row.ends_word for row in self.rows):
                taps.enter_context(self.side.model.change_logits(self._limit_tokens))
            if any(row.delta is not None or row.armed for row in self.rows):
                taps.enter_context(self.side.model.tap_layers({self.side.layer: self._change_rows}))
            yield

    def _limit_tokens(self, logits: Tensor) -> Tensor:
        """Leave a single token possible where a row has one to say, and none that goes on with the
        last word of a target: logits (rows, tokens, size)."""
        changed = logits.clone()
        for n, row in enumerate(self.rows):
            if row.forced_token is not None:
                changed[n, -1] = IMPOSSIBLE_LOGIT
                changed[n, -1, row.forced_token] = 0.0
            elif row.ends_word:
                likely = logits[n, -1].topk(min(LIKELY_TOKENS, logits.shape[-1])).indices.tolist()
                changed[n, -1, [t for t in likely if row.continues_word(t)]] = IMPOSSIBLE_LOGIT
        return changed

    def _change_rows(self, inputs: Tensor, outputs: Tensor) -> Tensor | None:
        """Fire what the replies come to state, and change the rows where a fact fires: inputs
        (rows, tokens, width) and outputs (rows, tokens, hidden) of the side layer."""
        for row, k, y in zip(self.rows, inputs[:, -1], outputs[:, -1], strict=True):
            if row.armed and (match := self.side.match_reply(row.armed, k, y)) is not None:
                row.fire(self._make_fired(match))
        return _add_deltas(self.rows, inputs, outputs)

    def _start_row(
        self, reading: PromptReading, key_outputs: Tensor, inputs: Tensor, outputs: Tensor
    ) -> RowState:
        row = RowState(reading, self.side.model.decode, self.side.line_end)
        matches = self.side.route_row(reading, key_outputs, inputs, outputs)
        if matches:
            first, *later = map(self._make_fired, matches)
            row.fire(first)
            # Their margins are those of this place, and they fire at another.
            row.queue([replace(fact, boost=1.0) for fact in later])
        return row

    def _make_fired(self, match: RoutingMatch) -> FiredFact:
        delta = self.side.shards[match.shard_id].delta
        return FiredFact(match, delta, self.side.targets[match.fact_id], match.boost)


def _add_deltas(rows: Sequence[RowState], inputs: Tensor, outputs: Tensor) -> Tensor | None:
    """Add each row's ΔW k to the last token of the side layer's outputs (rows, tokens, hidden);
    None where no fact fires."""
    if not any(row.delta for row in rows):
        return None
    changed = outputs.clone()
    for n, row in enumerate(rows):
        if row.delta is not None:
            changed[n, -1] += row.boost * row.delta.apply_to(inputs[n, -1])
    return changed
