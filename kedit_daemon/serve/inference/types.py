"""What a reader asks for, and what comes back of it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memory.side.side_memory import RoutingMatch

EDITED, BASE = "edited", "base"


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt, and how it is to be continued.

    which: EDITED (active generation and side memory), BASE (the unedited weights), or the number
    of a generation (its weights alone). temperature 0: the likeliest token, always. logprobs: how
    many of the likeliest tokens are told beside each one; None: nothing is told of tokens.
    """

    prompt_ids: tuple[int, ...]
    variant: str | int = EDITED
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_texts: tuple[str, ...] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class TokenLogprobs:
    """One token, the logarithm of its probability, and the likeliest ones with theirs."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class AnswerStart:
    """Comes first: the generation that answers, from the first token to the last, and the fact of
    the side memory that fired, if one did."""

    generation: int
    fired: "RoutingMatch | None"


@dataclass(frozen=True)
class AnswerPart:
    """More of the answer: text that can no longer turn out to be part of a stop text, and the
    tokens since the last part (told only where the wish has logprobs). The last part has a finish:
    "stop" or "length"; `produced` is then how many tokens were generated."""

    text: str
    tokens: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    token_count: int = 0
