"""Generation requests, and the items of an answer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from memory.side.shards import RoutingMatch

EDITED, BASE = "edited", "base"


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt, and how it is to be continued.

    variant: EDITED (active generation and side memory), BASE (the unedited weights), or the number
    of a generation (its weights alone). temperature 0: always the most likely token. logprobs: the
    number of most likely tokens to report for each token; None: report no tokens. echo: the tokens
    of the prompt are reported too, and with logprobs the one that ends the text; then max_tokens
    may be 0. is_reply: the answer is a chat's reply.
    """

    prompt_ids: tuple[int, ...]
    variant: str | int = EDITED
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_texts: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False
    is_reply: bool = False


@dataclass(frozen=True)
class TokenLogprobs:
    """A token, the logarithm of its probability, and the most likely tokens with theirs. The first
    token of a prompt follows nothing, and has none."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class EchoedPrompt:
    """The tokens of a prompt as the model would have said them, and the facts that fired within it,
    each with the number of the token behind which it did."""

    tokens: tuple[TokenLogprobs, ...]
    fired: "tuple[tuple[int, RoutingMatch], ...]" = ()


@dataclass(frozen=True)
class AnswerStart:
    """The first item of an answer: the generation of all its tokens, the fact of the side memory
    that fired at the prompt's end, if one did, and the prompt, if it is to be reported."""

    generation: int
    fired: "RoutingMatch | None"
    echoed: EchoedPrompt | None = None


@dataclass(frozen=True)
class AnswerPart:
    """The next text of an answer, which can no longer become part of a stop text.

    tokens: those since the last part, only if the request has logprobs. finish_reason: "stop" or
    "length" in the last part, whose token_count is the number of tokens generated, and whose
    fired are the facts that fired within the answer, each with the number of tokens before.
    """

    text: str
    tokens: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    token_count: int = 0
    fired: "tuple[tuple[int, RoutingMatch], ...]" = ()
