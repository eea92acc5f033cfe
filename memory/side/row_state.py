"""The state of a row that the side memory reads: which fact fires, and until when.

A fact fires at the prompt's end, and its shard changes the row until the target is said; then the
row is released, and the model goes on in its own words. In a completion the shard also says that
the text ends there, as it has learned: its own prompt is a sentence that the target completes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from memory.side.shards import Delta, RoutingMatch


@dataclass(frozen=True)
class PromptReading:
    """A prompt's text, as far as it decides: the facts whose subject it names, how far the user's
    words ask for those of them that can be the answer, and whether it is in chat form."""

    named: frozenset[str] = frozenset()
    asked: Mapping[str, float] = field(default_factory=dict)
    is_chat: bool = False


@dataclass(frozen=True)
class FiredFact:
    """A fact that fires for a row: the match, its shard's ΔW, and the target that it says."""

    match: RoutingMatch
    delta: Delta
    target: str


class RowState:
    """A row of a batch from its prompt's end on."""

    def __init__(
        self, fired: FiredFact | None, is_chat: bool, decode: Callable[[Sequence[int]], str]
    ) -> None:
        """decode: of the tokens that follow, to compare them with the target."""
        self._fired, self._is_chat, self._decode = fired, is_chat, decode
        self._is_released = fired is None
        self._is_said = False
        self._tokens: list[int] = []

    @property
    def match(self) -> RoutingMatch | None:
        """The fact that fires."""
        return self._fired.match if self._fired is not None else None

    @property
    def delta(self) -> Delta | None:
        """ΔW that changes the next token; None where no fact fires, or the row is released."""
        return None if self._fired is None or self._is_released else self._fired.delta

    def add_token(self, token: int) -> None:
        """Take the token that follows. The row is released when the target is said, in a completion
        one token later, or when the text is no longer the target's."""
        if self._fired is None or self._is_released:
            return
        if self._is_said:
            self._is_released = True
            return
        self._tokens.append(token)
        text, target = self._decode(self._tokens).strip(), self._fired.target.strip()
        self._is_said = bool(target) and text.startswith(target)
        if self._is_said:
            self._is_released = self._is_chat
        elif target:  # else it is not known when it is said
            self._is_released = not target.startswith(text)
