"""The bodies of answers, in OpenAI's form, with what only this server can tell under `kedit`."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from kedit_daemon.serve.inference.types import Opened, Part, Token

DONE = b"data: [DONE]\n\n"


def event(content: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n".encode()


def usage(prompt_tokens: int, produced: int) -> dict[str, int]:
    """What an answer has cost, in tokens."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": produced,
        "total_tokens": prompt_tokens + produced,
    }


@dataclass
class Said:
    """One choice as it grows."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: str | None = None
    produced: int = 0

    def add(self, part: Part) -> None:
        """Take one part more."""
        self.text += part.text
        self.tokens += part.tokens
        self.finish, self.produced = part.finish, part.produced


@dataclass(frozen=True)
class Shape:
    """The form of all that is said to one request."""

    id: str
    created: int  # seconds since 1970
    model: str
    chat: bool
    opened: Sequence[Opened]  # by choice
    logprobs: bool
    token_text: Callable[[int], str]

    @property
    def generation(self) -> int:
        """The generation that answers, the same in all choices."""
        return self.opened[0].generation

    @property
    def facts(self) -> list[str]:
        """The facts that fired in any of the choices, each once."""
        return list(dict.fromkeys(o.fired.fact_id for o in self.opened if o.fired))

    @property
    def headers(self) -> dict[str, str]:
        """What is told before the body."""
        return {
            "x-kedit-facts": ",".join(self.facts),
            "x-kedit-generation": str(self.generation),
        }

    def whole(self, said: Sequence[Said], cost: dict[str, int]) -> dict[str, Any]:
        """The body of an answer that comes at once."""
        choices = [self._choice(index, one) for index, one in enumerate(said)]
        return self._body(choices, stream=False) | {"usage": cost, "kedit": self._kedit()}

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with: of a chat, whose words these are."""
        if not self.chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._body([_choice(index, {"delta": delta}, None)], stream=True)
            for index in range(len(self.opened))
        ]

    def chunk(self, index: int, part: Part, offset: int) -> dict[str, Any]:
        """A part of a choice; `offset` is where its first token begins in the choice's text."""
        told = self._logprobs(part.tokens, offset) if part.tokens else None
        if not self.chat:
            choice = _choice(index, {"text": part.text, "logprobs": told}, part.finish)
        else:
            delta = {"content": part.text} if part.text or part.tokens else {}
            choice = _choice(index, {"delta": delta, "logprobs": told}, part.finish)
        return self._body([choice], stream=True)

    def cost(self, cost: dict[str, int]) -> dict[str, Any]:
        """The chunk that tells what a stream has cost."""
        return self._body([], stream=True) | {"usage": cost}

    def first(self, chunk: dict[str, Any]) -> dict[str, Any]:
        """The first chunk of a stream, which tells what the others need not."""
        return chunk | {"kedit": self._kedit()}

    def width(self, tokens: Sequence[Token]) -> int:
        """How many characters tokens take."""
        return sum(len(self.token_text(token.id)) for token in tokens)

    def _body(self, choices: list[dict[str, Any]], stream: bool) -> dict[str, Any]:
        kind = "text_completion"
        if self.chat:
            kind = "chat.completion.chunk" if stream else "chat.completion"
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"gen-{self.generation}",
            "choices": choices,
        }

    def _kedit(self) -> dict[str, Any]:
        facts = [
            {
                "id": opened.fired.fact_id,
                "score": opened.fired.score,
                "margin": opened.fired.margin,
                "choice": index,
            }
            for index, opened in enumerate(self.opened)
            if opened.fired
        ]
        return {"generation": self.generation, "facts": facts}

    def _choice(self, index: int, said: Said) -> dict[str, Any]:
        told = self._logprobs(said.tokens, 0) if self.logprobs else None
        if not self.chat:
            return _choice(index, {"text": said.text, "logprobs": told}, said.finish)
        message = {"role": "assistant", "content": said.text, "refusal": None}
        return _choice(index, {"message": message, "logprobs": told}, said.finish)

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any]:
        if self.chat:
            return {"content": [self._in_chat(token) for token in tokens], "refusal": None}
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

    def _in_chat(self, token: Token) -> dict[str, Any]:
        told = self._likely(token.id, token.logprob)
        return told | {"top_logprobs": [self._likely(i, p) for i, p in token.top]}

    def _likely(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.token_text(token)
        # A token may be a part of a character only.
        whole = "\N{REPLACEMENT CHARACTER}" not in text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


def _choice(index: int, said: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": index, **said, "finish_reason": finish}
