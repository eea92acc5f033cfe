"""The bodies of answers in OpenAI's form; the fields that are ours stand under `kedit`."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from kedit_daemon.serve.inference.types import AnswerPart, AnswerStart, TokenLogprobs

if TYPE_CHECKING:
    from memory.side.shards import RoutingMatch

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
    fired: "Sequence[tuple[int, RoutingMatch]]" = ()

    def add_part(self, part: AnswerPart) -> None:
        """Append a part."""
        self.text += part.text
        self.tokens += part.tokens
        self.finish_reason, self.token_count = part.finish_reason, part.token_count
        self.fired = part.fired


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
    echoes: Sequence[str] = ()  # by choice, the prompts that the answers begin with

    @property
    def generation(self) -> int:
        """The generation that answers, the same in all choices."""
        return self.answer_starts[0].generation

    def build_headers(self, answers: Sequence[Choice] = ()) -> dict[str, str]:
        """Build the HTTP headers of an answer; a stream's are sent before there are choices."""
        fired = [fact["id"] for fact in self._list_fired()]
        fired += [match.fact_id for answer in answers for _, match in answer.fired]
        return {
            "x-kedit-facts": ",".join(dict.fromkeys(fired)),
            "x-kedit-generation": str(self.generation),
        }

    def build_response(self, answers: Sequence[Choice], usage: dict[str, int]) -> dict[str, Any]:
        """Build the body of a whole answer."""
        choices = [self._build_choice(index, answer) for index, answer in enumerate(answers)]
        body = self._build_body(choices, stream=False)
        kedit = self._build_kedit()
        for index, answer in enumerate(answers):
            kedit["facts"] += _describe_reply(answer.fired, index)
        return body | {"usage": usage, "kedit": kedit}

    def build_opening(self) -> list[dict[str, Any]]:
        """Build the first chunks of a chat's stream, which give the role."""
        if not self.is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._build_body([_make_choice(index, {"delta": delta}, None)], stream=True)
            for index in range(len(self.answer_starts))
        ]

    def build_echo_chunk(self, index: int) -> dict[str, Any]:
        """Build the chunk of the prompt that a choice begins with."""
        tokens, texts = self._list_echoed(index)
        logprobs = self._build_text_logprobs(tokens, texts, 0) if tokens else None
        content = {"text": self.echoes[index], "logprobs": logprobs}
        return self._build_body([_make_choice(index, content, None)], stream=True)

    def count_echo(self, index: int) -> int:
        """Return the number of characters of the tokens that a choice begins with."""
        return sum(map(len, self._list_echoed(index)[1])) if self.echoes else 0

    def build_chunk(self, index: int, part: AnswerPart, offset: int) -> dict[str, Any]:
        """Build the chunk of a part; `offset` is the position of its first token in the choice's
        text."""
        logprobs = self._build_logprobs(part.tokens, offset) if part.tokens else None
        content: dict[str, Any] = {"text": part.text}
        if self.is_chat:
            content = {"delta": {"content": part.text} if part.text or part.tokens else {}}
        choice = _make_choice(index, content | {"logprobs": logprobs}, part.finish_reason)
        body = self._build_body([choice], stream=True)
        if part.fired:
            body["kedit"] = {"facts": _describe_reply(part.fired, index)}
        return body

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
        return {"generation": self.generation, "facts": list(self._list_fired())}

    def _list_fired(self) -> Iterator[dict[str, Any]]:
        """Yield the facts that fired, by choice: those within its prompt, then the one behind."""
        for index, start in enumerate(self.answer_starts):
            for token, match in start.echoed.fired if start.echoed else ():
                yield _describe_match(match, index) | {"token": token}
            if start.fired:
                yield _describe_match(start.fired, index)

    def _list_echoed(self, index: int) -> tuple[Sequence[TokenLogprobs], list[str]]:
        """Return the tokens of a choice's prompt that are reported, and their texts.

        The first may be the tokenizer's own, which is not in the text; or have a space before it
        that only stands within a sentence.
        """
        echoed = self.answer_starts[index].echoed
        if echoed is None:
            return (), []
        texts = [self.token_text(token.id) for token in echoed.tokens]
        if not self.echoes[index].startswith(texts[0]):
            bare = texts[0].lstrip()
            texts[0] = bare if bare and self.echoes[index].startswith(bare) else ""
        return echoed.tokens, texts

    def _build_choice(self, index: int, answer: Choice) -> dict[str, Any]:
        text = answer.text
        logprobs = self._build_logprobs(answer.tokens, 0) if self.has_logprobs else None
        if self.is_chat:
            message = {"role": "assistant", "content": text, "refusal": None}
            content: dict[str, Any] = {"message": message}
            return _make_choice(index, content | {"logprobs": logprobs}, answer.finish_reason)
        if self.echoes:
            text = self.echoes[index] + text
            if self.has_logprobs:
                tokens, texts = self._list_echoed(index)
                said = [self.token_text(token.id) for token in answer.tokens]
                logprobs = self._build_text_logprobs([*tokens, *answer.tokens], texts + said, 0)
        return _make_choice(index, {"text": text, "logprobs": logprobs}, answer.finish_reason)

    def _build_logprobs(self, tokens: Sequence[TokenLogprobs], offset: int) -> dict[str, Any]:
        if self.is_chat:
            return {"content": [self._chat_logprobs(token) for token in tokens], "refusal": None}
        texts = [self.token_text(token.id) for token in tokens]
        return self._build_text_logprobs(tokens, texts, offset)

    def _build_text_logprobs(
        self, tokens: Sequence[TokenLogprobs], texts: Sequence[str], offset: int
    ) -> dict[str, Any]:
        """Build the figures of tokens and their texts, from an offset in the choice's text on."""
        return {
            "tokens": list(texts),
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [
                self._rank_texts(token, text) for token, text in zip(tokens, texts, strict=True)
            ],
            "text_offset": list(accumulate(map(len, texts[:-1]), initial=offset)),
        }

    def _rank_texts(self, token: TokenLogprobs, text: str) -> dict[str, float] | None:
        if token.logprob is None:
            return None
        # Two tokens may have the same text: the more likely one comes last, and is kept.
        return {self.token_text(i): p for i, p in reversed(token.top)} | {text: token.logprob}

    def _chat_logprobs(self, token: TokenLogprobs) -> dict[str, Any]:
        top = [self._token_logprob(i, p) for i, p in token.top]
        return self._token_logprob(token.id, token.logprob) | {"top_logprobs": top}

    def _token_logprob(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.token_text(token)
        whole = "\N{REPLACEMENT CHARACTER}" not in text  # else it has a part of a character
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


def _describe_match(match: "RoutingMatch", choice: int) -> dict[str, Any]:
    return {"id": match.fact_id, "score": match.score, "margin": match.margin, "choice": choice}


def _describe_reply(
    fired: "Sequence[tuple[int, RoutingMatch]]", choice: int
) -> list[dict[str, Any]]:
    """Describe the facts that fired within an answer."""
    return [_describe_match(match, choice) | {"reply_token": token} for token, match in fired]


def _make_choice(index: int, content: dict[str, Any], finish: str | None) -> dict[str, Any]:
    return {"index": index, **content, "finish_reason": finish}
