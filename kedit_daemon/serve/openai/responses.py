"""The bodies of answers in OpenAI's form; the fields that are ours stand under `kedit`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from kedit_daemon.serve.inference.types import AnswerPart, AnswerStart, TokenLogprobs

DONE_EVENT = b"data: [DONE]\n\n"


def encode_event(content: dict[str, Any]) -> bytes:
    """Encode one server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


def build_usage(prompt_tokens: int, produced: int) -> dict[str, int]:
    """Return the token counts of an answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": produced,
        "total_tokens": prompt_tokens + produced,
    }


@dataclass
class Choice:
    """A choice as it grows."""

    text: str = ""
    tokens: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    token_count: int = 0

    def add_part(self, part: AnswerPart) -> None:
        """Append a part."""
        self.text += part.text
        self.tokens += part.tokens
        self.finish_reason, self.token_count = part.finish_reason, part.token_count


@dataclass(frozen=True)
class ResponseBuilder:
    """Builds the bodies that answer one request."""

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
        """The ids of the facts that fired in any of the choices, each once."""
        return list(dict.fromkeys(s.fired.fact_id for s in self.answer_starts if s.fired))

    @property
    def headers(self) -> dict[str, str]:
        """The HTTP headers of the answer."""
        return {
            "x-kedit-facts": ",".join(self.fired_fact_ids),
            "x-kedit-generation": str(self.generation),
        }

    def build_response(self, answers: Sequence[Choice], usage: dict[str, int]) -> dict[str, Any]:
        """Build the body of a whole answer."""
        choices = [self._build_choice(index, answer) for index, answer in enumerate(answers)]
        body = self._build_body(choices, stream=False)
        return body | {"usage": usage, "kedit": self._build_kedit()}

    def build_opening(self) -> list[dict[str, Any]]:
        """Build the first chunks of a chat's stream, which give the role."""
        if not self.is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._build_body([_make_choice(index, {"delta": delta}, None)], stream=True)
            for index in range(len(self.answer_starts))
        ]

    def build_chunk(self, index: int, part: AnswerPart, offset: int) -> dict[str, Any]:
        """Build the chunk of a part; `offset` is the position of its first token in the choice's
        text."""
        logprobs = self._build_logprobs(part.tokens, offset) if part.tokens else None
        content: dict[str, Any] = {"text": part.text}
        if self.is_chat:
            content = {"delta": {"content": part.text} if part.text or part.tokens else {}}
        choice = _make_choice(index, content | {"logprobs": logprobs}, part.finish_reason)
        return self._build_body([choice], stream=True)

    def build_usage_chunk(self, usage: dict[str, int]) -> dict[str, Any]:
        """Build the chunk with a stream's token counts."""
        return self._build_body([], stream=True) | {"usage": usage}

    def mark_first_chunk(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """Add the fields that only the first chunk of a stream has."""
        return chunk | {"kedit": self._build_kedit()}

    def count_characters(self, tokens: Sequence[TokenLogprobs]) -> int:
        """Return the number of characters of tokens."""
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
                "id": start.fired.fact_id,
                "score": start.fired.score,
                "margin": start.fired.margin,
                "choice": index,
            }
            for index, start in enumerate(self.answer_starts)
            if start.fired
        ]
        return {"generation": self.generation, "facts": facts}

    def _build_choice(self, index: int, answer: Choice) -> dict[str, Any]:
        logprobs = self._build_logprobs(answer.tokens, 0) if self.has_logprobs else None
        content: dict[str, Any] = {"text": answer.text}
        if self.is_chat:
            message = {"role": "assistant", "content": answer.text, "refusal": None}
            content = {"message": message}
        return _make_choice(index, content | {"logprobs": logprobs}, answer.finish_reason)

    def _build_logprobs(self, tokens: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
        if self.is_chat:
            return {"content": [self._chat_logprobs(token) for token in tokens], "refusal": None}
        texts = [self.token_text(token.id) for token in tokens]
        offsets = list(accumulate(map(len, texts[:-1]), initial=offset))
        tops = [
            # Two tokens may have the same text: the more likely one comes last, and is kept.
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
        top = [self._token_logprob(i, p) for i, p in token.top]
        return self._token_logprob(token.id, token.logprob) | {"top_logprobs": top}

    def _token_logprob(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token)
        whole = "\N{REPLACEMENT CHARACTER}" not in text  # else it has a part of a character
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


def _make_choice(index: int, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": index, **content, "finish_reason": finish}
