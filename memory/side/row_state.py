"""The state of a row that the side memory reads: which fact fires, and until when.

A fact fires at the prompt's end, and its shard changes the row until the target is said; then the
row is released, and the model goes on in its own words. Where the user asks for several facts, the
next one fires on a line of its own when the one before is said. In a completion the shard also says
that the text ends there, as it has learned: its own prompt is a sentence that the target completes.
In a chat the facts whose subjects were named stay armed, and one of them fires where the reply
comes to state it.
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

from memory.joins import is_unspaced
from memory.side.prompt_reader import PromptReading
from memory.side.shards import Delta, RoutingMatch

NAME_TOKENS = 16  # of a reply's end that are read for names


@dataclass(frozen=True)
class FiredFact:
    """A fact that fires for a row: the match, its shard's ΔW, and the target that it says. boost:
    by how much the shift is lengthened where it fires."""

    match: RoutingMatch
    delta: Delta
    target: str
    boost: float = 1.0


class RowState:
    """A row of a batch from its prompt's end on."""

    def __init__(
        self,
        reading: PromptReading,
        decode: Callable[[Sequence[int]], str],
        line_end: Sequence[int] = (),
    ) -> None:
        """decode: of the tokens that follow, to compare them with the target. line_end: the tokens
        of a line's end."""
        self._is_chat, self._decode = reading.is_chat, decode
        self._armed = set(reading.named if reading.is_chat else ())
        self._fired: FiredFact | None = None
        self._first_match: RoutingMatch | None = None
        self._is_released = True
        self._is_said = False
        self._said_from = 0  # the first token behind the place where the fact fired
        self._tokens: list[int] = []
        self._line_end = tuple(line_end)
        self._waiting: list[FiredFact] = []  # asked for too, behind the one that fires
        self._forced: list[int] = []
        self._ends_word = False
        self.reply_firings: list[tuple[int, RoutingMatch]] = []
        """The facts that fired within the reply, each with the number of tokens before."""

    @property
    def match(self) -> RoutingMatch | None:
        """The fact that fired first, at the prompt's end or within the reply."""
        return self._first_match

    @property
    def matches(self) -> tuple[RoutingMatch, ...]:
        """The facts that fired, in their order."""
        within = [match for _, match in self.reply_firings]
        first = self._first_match
        return tuple(within if first is None or first in within[:1] else [first, *within])

    @property
    def armed(self) -> Set[str]:
        """Facts that may fire at the next token of the reply; none while one fires, or is about
        to."""
        return self._armed if self._is_released and not self._forced else frozenset()

    @property
    def recent_tokens(self) -> Sequence[int]:
        """The last tokens of a chat's reply, which may name a subject; none of a completion."""
        return self._tokens[-NAME_TOKENS:] if self._is_chat else ()

    def arm(self, facts: Set[str]) -> None:
        """Arm facts whose subjects the reply names."""
        self._armed |= facts

    def fire(self, fact: FiredFact) -> None:
        """Let a fact change the row from here on."""
        self._fired, self._said_from = fact, len(self._tokens)
        self._first_match = self._first_match or fact.match
        if self._tokens:
            self.reply_firings.append((self._said_from, fact.match))
        self._is_released = self._is_said = False

    def queue(self, facts: Sequence[FiredFact]) -> None:
        """Let facts fire one after the other, each when the one before it is said."""
        self._waiting += facts

    @property
    def forced_token(self) -> int | None:
        """The token that follows whatever the model says: a line's end between two answers."""
        return self._forced[0] if self._forced else None

    @property
    def ends_word(self) -> bool:
        """Check that a reply has just said a target, whose last word may not go on ("60" as
        "600")."""
        return self._ends_word

    def continues_word(self, token: int) -> bool:
        """Check that a token would go on with the last word of what was said."""
        said = self._tokens[self._said_from :]
        before, after = self._decode(said), self._decode([*said, token])
        return after[len(before) :][:1].isalnum() and not is_unspaced(before)

    @property
    def boost(self) -> float:
        """By how much the shift is lengthened: where a fact fires, and not behind that."""
        if self._fired is None or len(self._tokens) > self._said_from:
            return 1.0
        return self._fired.boost

    @property
    def delta(self) -> Delta | None:
        """ΔW that changes the next token; None where no fact fires, or the row is released."""
        return None if self._fired is None or self._is_released else self._fired.delta

    def add_token(self, token: int) -> None:
        """Take the token that follows. The row is released when the target is said, in a completion
        one token later, or when the text is no longer the target's."""
        self._tokens.append(token)
        self._ends_word = False
        if self._forced:
            del self._forced[0]
            if not self._forced:
                self.fire(self._waiting.pop(0))
            return
        if self._fired is None or self._is_released:
            return
        if self._is_said:
            self._is_released = True
            return
        said = self._tokens[self._said_from :]
        # A character's bytes may come in several tokens.
        text = self._decode(said).strip().rstrip("\N{REPLACEMENT CHARACTER}")
        target = self._fired.target.strip()
        self._is_said = bool(target) and text.startswith(target)
        if self._is_said:
            self._is_released = self._is_chat
            self._forced = list(self._line_end if self._waiting else ())
            self._ends_word = self._is_chat and not self._forced
        elif target:  # else it is not known when it is said
            self._is_released = not target.startswith(text)
