"""An engine's answer on its way to a client: passed as it comes, with the names of the facts that
were put into the request."""

import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
from pydantic_core import from_json, to_json
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from kedit_daemon.serve.errors import RequestError
from kedit_daemon.serve.router.event_lines import read_event, split_lines

if TYPE_CHECKING:  # it imports torch
    from kedit_daemon.serve.router.routed_facts import RoutedFact

# What belongs to one connection, or describes a body that may be changed.
CONNECTION_HEADERS = {
    *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te"),
    *(b"trailer", b"transfer-encoding", b"upgrade", b"content-length", b"host"),
}
OWN_HEADERS = {b"set-cookie", b"date", b"server"}
CORS_PREFIX = b"access-control-"
EVENT_STREAM = "text/event-stream"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NamedFacts:
    """The facts of a request by its prompts, empty if there are none; the generation of the home
    that they are of; and the number of choices that each prompt has in the answer.

    said: what adapters have said, in some tokens, before the engine's answer goes on from it.
    model: that the client has asked for, where an adapter answers in its place. Without either, the
    facts are in the prompt, and nothing says that the engine goes by them."""

    generation: int
    by_prompt: "Sequence[Sequence[RoutedFact]]" = ()
    choices: int = 1
    said: str = ""
    tokens: int = 0
    model: str | None = None

    @property
    def distinct(self) -> "list[RoutedFact]":
        """The facts of all prompts, each once."""
        return list({one.fact.id: one for facts in self.by_prompt for one in facts}.values())

    @property
    def by(self) -> str:
        """How the facts were put in."""
        if not self.by_prompt:
            return "none"
        return "adapter" if self.said or self.model else "context"

    @property
    def headers(self) -> dict[str, str]:
        """The HTTP headers that name them."""
        ids = ",".join(one.fact.id for one in self.distinct)
        return {"x-kedit-facts": ids, "x-kedit-generation": str(self.generation)}

    @property
    def field(self) -> dict[str, Any]:
        """The field `kedit` of an answer."""
        described = [
            {"id": one.fact.id, "score": one.score, "choice": place * self.choices + choice}
            for place, facts in enumerate(self.by_prompt)
            for choice in range(self.choices)
            for one in facts
        ]
        return {"generation": self.generation, "facts": described, "by": self.by}

    def complete_body(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the body of a whole answer with the facts, and all that belongs to it."""
        for choice in body["choices"] if self.said else ():
            choice["message"]["content"] = self.said + (choice["message"].get("content") or "")
        self._correct(body)
        return {**body, "kedit": self.field}

    def complete_event(self, event: dict[str, Any], begun: set[int]) -> dict[str, Any]:
        """Return an event of a stream likewise. begun: the choices whose reply has begun, to which
        those of this event are added."""
        is_first = not begun
        for choice in event.get("choices", ()):
            if choice["index"] not in begun and self.said:
                choice["delta"]["content"] = self.said + (choice["delta"].get("content") or "")
            begun.add(choice["index"])
        self._correct(event)
        return {**event, "kedit": self.field} if is_first and begun else event

    def _correct(self, body: dict[str, Any]) -> None:
        """Name the model that was asked for, and count what adapters have said as part of the
        answer, and not of the prompt."""
        if self.model is not None and "model" in body:
            body["model"] = self.model
        if self.said and (usage := body.get("usage")):
            usage["prompt_tokens"] -= self.tokens
            usage["completion_tokens"] += self.tokens


async def name_facts(answer: httpx.Response, named: NamedFacts) -> Response:
    """Return an engine's answer, with the facts named in its headers, and in its body if there are
    some. An error of the engine stays as it is. Raises RequestError (502): it breaks off."""
    if not named.by_prompt or answer.status_code != httpx.codes.OK:
        return PassedAnswer(answer, named.headers)
    if answer.headers.get("content-type", "").startswith(EVENT_STREAM):
        return PassedAnswer(answer, named.headers, _name_in_stream(answer, named))
    try:
        body = named.complete_body(from_json(await answer.aread()))
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        log.warning("An engine's answer cannot be read: %r", error)
        message = "the engine's answer broke off"
        raise RequestError(message, status=502, code="engine_broke_off") from error
    finally:
        await answer.aclose()
    whole = Response(to_json(body), answer.status_code)
    length = (b"content-length", str(len(whole.body)).encode())
    whole.raw_headers = [*_select_headers(answer, named.headers), length]
    return whole


class PassedAnswer(StreamingResponse):
    """An engine's answer as it comes, byte for byte, unless other content is given for it."""

    def __init__(
        self,
        answer: httpx.Response,
        extra: Mapping[str, str],
        content: AsyncIterator[bytes] | None = None,
    ) -> None:
        super().__init__(content or answer.aiter_raw(), answer.status_code)
        self.raw_headers = _select_headers(answer, extra)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; the engine hears of a client that has gone."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._answer.aclose()


def _select_headers(answer: httpx.Response, extra: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    """Return an engine's headers that are for clients, and those that are added. Cookies, and who
    may read the answer, are this server's to say."""
    dropped = CONNECTION_HEADERS | OWN_HEADERS
    lowered = [(name.lower(), value) for name, value in answer.headers.raw]
    kept = [one for one in lowered if one[0] not in dropped and not one[0].startswith(CORS_PREFIX)]
    return kept + [(name.encode(), value.encode()) for name, value in extra.items()]


async def _name_in_stream(answer: httpx.Response, named: NamedFacts) -> AsyncIterator[bytes]:
    """Yield a stream's events. What is not changed passes as it is: by a line of context, all but
    the first event of each choice."""
    begun = set[int]()
    all_choices = named.choices * len(named.by_prompt)
    async for line in split_lines(answer.aiter_raw()):
        is_whole = not named.said and named.model is None and len(begun) == all_choices
        event = None if is_whole else read_event(line)
        if event is None:
            yield line
        else:
            yield b"data: " + to_json(named.complete_event(event, begun)) + b"\n"
