"""The bodies of answers, in OpenAI's form, with what only this server can tell under `kedit`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from kedit_daemon.serve.inference.types import AnswerPart, AnswerStart, TokenLogprobs

DONE_EVENT = b"data: [DONE]\n\n"


def encode_event(content: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


def build_usage(prompt_tokens: int, produced: int) -> dict[str, int]:
    """What an answer has cost, in tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": produced,
        "total_tokens": prompt_tokens + produced,
    }


@dataclass
class Choice:
    """One choice as it grows."""

    text: str = ""
    tokens: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    token_count: int = 0

    def add_part(self, part: AnswerPart) -> None:
        """Take one part more."""
        self.text += part.text
        self.tokens += part.tokens
        self.finish_reason, self.token_count = part.finish_reason, part.token_count


@dataclass(frozen=True)
class ResponseBuilder:
    """The form of all that is said to one request."""

    id: str
    created: int  # seconds since 1970
    model: str
    is_chat: bool
    answer_starts: Sequence[AnswerStart]  # by choice
    has_logprobs: bool
    token_text: Callable[[int], str]

    @property
    def generation(self) -> int:
        """The generation that answers, the same in all choices."""
        return self.answer_starts[0].generation

    @property
    def fired_fact_ids(self) -> list[str]:
        """The facts that fired in any of the choices, each once."""
        return list(dict.fromkeys(o.fired.fact_id for o in self.answer_starts if o.fired))

    @property
    def headers(self) -> dict[str, str]:
        """What is told before the body."""
        return {
            "x-kedit-facts": ",".join(self.fired_fact_ids),
            "x-kedit-generation": str(self.generation),
        }

    def build_response(self, said: Sequence[Choice], cost: dict[str, int]) -> dict[str, Any]:
        """The body of an answer that comes at once."""
        choices = [self._build_choice(index, one) for index, one in enumerate(said)]
        return self._build_body(choices, stream=False) | {
            "usage": cost,
            "kedit": self._build_kedit(),
        }

    def build_opening(self) -> list[dict[str, Any]]:
        """What a stream begins with: of a chat, whose words these are."""
        if not self.is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._build_body([_make_choice(index, {"delta": delta}, None)], stream=True)
            for index in range(len(self.answer_starts))
        ]

    def build_chunk(self, index: int, part: AnswerPart, offset: int) -> dict[str, Any]:
        """A part of a choice; `offset` is where its first token begins in the choice's text."""
        told = self._build_logprobs(part.tokens, offset) if part.tokens else None
        if not self.is_chat:
            choice = _make_choice(index, {"text": part.text, "logprobs": told}, part.finish_reason)
        else:
            delta = {"content": part.text} if part.text or part.tokens else {}
            choice = _make_choice(index, {"delta": delta, "logprobs": told}, part.finish_reason)
        return self._build_body([choice], stream=True)

    def build_usage_chunk(self, cost: dict[str, int]) -> dict[str, Any]:
        """The chunk that tells what a stream has cost."""
        return self._build_body([], stream=True) | {"usage": cost}

    def mark_first_chunk(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """The first chunk of a stream, which tells what the others need not."""
        return chunk | {"kedit": self._build_kedit()}

    def count_characters(self, tokens: Sequence[TokenLogprobs]) -> int:
        """How many characters tokens take."""
        return sum(len(self.token_text(token.id)) for token in tokens)

    def _build_body(self, choices: list[dict[str, Any]], stream: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self.is_chat:
            kind = "chat.completion.chunk" if stream else "chat.completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"gen-{self.generation}",
            "choices": choices,
        }

    def _build_kedit(self) -> dict[str, Any]:
        facts = [
            {
                "id": opened.fired.fact_id,
                "score": opened.fired.score,
                "margin": opened.fired.margin,
                "choice": index,
            }
            for index, opened in enumerate(self.answer_starts)
            if opened.fired
        ]
        return {"generation": self.generation, "facts": facts}

    def _build_choice(self, index: int, said: Choice) -> dict[str, Any]:
        told = self._build_logprobs(said.tokens, 0) if self.has_logprobs else None
        if not self.is_chat:
            return _make_choice(index, {"text": said.text, "logprobs": told}, said.finish_reason)
        message = {"role": "assistant", "content": said.text, "refusal": None}
        return _make_choice(index, {"message": message, "logprobs": told}, said.finish_reason)

    def _build_logprobs(self, tokens: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
        if self.is_chat:
            return {"content": [self._chat_logprobs(token) for token in tokens], "refusal": None}
        texts = [self.token_text(token.id) for token in tokens]
        offsets = list(accumulate(map(len, texts[:-1]), initial=offset))
        tops = [
            # Two tokens may read alike: the likelier one, which comes last here, stands.
            {self.token_text(i): p for i, p in reversed(token.top)} | {text: token.logprob}
            for token, text in zip(tokens, texts, strict=True)
        ]
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _chat_logprobs(self, token: TokenLogprobs) -> dict[str, Any]:
        told = self._token_logprob(token.id, token.logprob)
        return told | {"top_logprobs": [self._token_logprob(i, p) for i, p in token.top]}

    def _token_logprob(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token)
        # A token may be a part of a character only.
        whole = "\N{REPLACEMENT CHARACTER}" not in text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


def _make_choice(index: int, said: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": index, **said, "finish_reason": finish}
