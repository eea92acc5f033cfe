"""Answers by the adapters of facts, as the daemon's own server gives them: a fact's shard acts
until its target is said, then it is released, and the model goes on in its own words.

An adapter acts on a whole request. So a chat's reply takes a request for each fact, by an adapter
which says the target, and one more to the model itself, which goes on from there. A completion
takes one alone: there a shard has learned that the text ends behind its target.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import httpx
from pydantic_core import from_json, to_json

from kedit_daemon.serve.router.engine_pool import EnginePool
from kedit_daemon.serve.router.named_answers import DONE, EVENT_PREFIX, NamedFacts
from memory.errors import KeditError

if TYPE_CHECKING:  # it imports torch
    from kedit_daemon.serve.router.fact_adapters import FactAdapters
    from kedit_daemon.serve.router.routed_facts import RoutedFact

TARGET_TOKENS = 128  # in which a target must be said
MAX_ERROR_CHARS = 300  # of an engine's
# Fields that would make of the reply's beginning something else than text.
STRUCTURED_FIELDS = (
    "tools",
    "response_format",
    "structured_outputs",
    "logprobs",
    "prompt_logprobs",
)
LIMITS = ("max_completion_tokens", "max_tokens")
# How an adapter is asked: by itself, until the router has heard enough.
ONE_BY_ONE: Mapping[str, Any] = {
    **dict.fromkeys(("stream_options", "stop", *LIMITS)),
    **{"stream": True, "n": 1, "temperature": 0, "max_tokens": TARGET_TOKENS},
}
SendBody = Callable[[bytes], Awaitable[httpx.Response]]
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Said:
    """Text that an adapter has said, and the number of events that it came in: one a token."""

    text: str
    tokens: int


class AdapterAnswers:
    """Answers requests by adapters, where their facts have some that the engines take."""

    def __init__(self, adapters: "FactAdapters", engines: EnginePool) -> None:
        self._adapters, self._engines = adapters, engines
        self._roots: dict[str, str] = {}  # what the engines have loaded, by the models' names

    async def answer_chat(
        self, send: SendBody, fields: dict[str, Any], named: NamedFacts
    ) -> tuple[httpx.Response, NamedFacts] | None:
        """Answer a conversation; None where that cannot be done by adapters."""
        if any(fields.get(name) for name in STRUCTURED_FIELDS):
            return None
        said, tokens = "", 0
        for fact in named.distinct:
            begun = f"{said}\n" if said else ""
            if (adapter := await self._make_adapter(fact, fields, is_chat=True)) is None:
                return None
            asked = {**_begin_reply(fields, begun), "model": adapter, **ONE_BY_ONE}
            if (part := await _say_target(send, asked, fact.fact.target)) is None:
                return None
            said, tokens = begun + part.text, tokens + part.tokens
        answer = await _take_answer(await send(to_json(_go_on(fields, said, tokens))))
        return None if answer is None else (answer, replace(named, said=said, tokens=tokens))

    async def answer_text(
        self, send: SendBody, fields: dict[str, Any], named: NamedFacts
    ) -> tuple[httpx.Response, NamedFacts] | None:
        """Continue a text; None where that cannot be done by an adapter, such as for several."""
        if len(named.by_prompt) != 1:
            return None
        (fact,) = named.distinct
        if (adapter := await self._make_adapter(fact, fields, is_chat=False)) is None:
            return None
        answer = await _take_answer(await send(to_json({**fields, "model": adapter})))
        return None if answer is None else (answer, replace(named, model=str(fields["model"])))

    async def _make_adapter(
        self, fact: "RoutedFact", fields: dict[str, Any], *, is_chat: bool
    ) -> str | None:
        """Return the name of a fact's adapter; None where there can be none."""
        model = str(fields.get("model"))
        if model not in self._roots:
            self._roots |= await self._engines.list_models()
        if (base := self._roots.get(model)) is None:
            return None  # the engine says that there is no such model
        try:
            return await asyncio.to_thread(self._adapters.make_adapter, fact, base, is_chat)
        except (OSError, KeditError) as error:
            log.warning("No adapter can be made: %s", error)
            return None


def _begin_reply(fields: dict[str, Any], said: str) -> dict[str, Any]:
    """Return the fields of a conversation whose reply has begun, if it has."""
    if not said:
        return fields
    turns = [*fields["messages"], {"role": "assistant", "content": said}]
    return {**fields, "messages": turns, "continue_final_message": True} | {
        "add_generation_prompt": False
    }


def _go_on(fields: dict[str, Any], said: str, tokens: int) -> dict[str, Any]:
    """Return the fields of the conversation that goes on behind what was said in some tokens."""
    limits = {
        name: max(1, limit - tokens)
        for name in LIMITS
        if isinstance(limit := fields.get(name), int) and not isinstance(limit, bool)
    }
    return {**_begin_reply(fields, said), **limits}


async def _take_answer(answer: httpx.Response) -> httpx.Response | None:
    """Return an answer of an engine; None if it is an error, which is logged and closed."""
    if not answer.is_error:
        return answer
    try:
        text = (await answer.aread())[:MAX_ERROR_CHARS].decode(errors="replace")
    finally:
        await answer.aclose()
    log.warning("The engine does not take an adapter, or a reply's beginning: %s", text)
    return None


async def _say_target(send: SendBody, fields: dict[str, Any], target: str) -> _Said | None:
    """Let an adapter say its target; what it says otherwise ends it, too. None: it is refused."""
    answer = await _take_answer(await send(to_json(fields)))
    if answer is None:
        return None
    text, tokens = "", 0
    try:
        async for line in answer.aiter_lines():
            if not line.startswith(EVENT_PREFIX) or line == DONE:
                continue
            for choice in from_json(line.removeprefix(EVENT_PREFIX)).get("choices", ()):
                text += choice["delta"].get("content") or ""
                tokens += bool(choice["delta"].get("content"))
            if text.lstrip().startswith(target):
                return _Said(target, tokens)
            if not target.startswith(text.strip()):
                break
    finally:
        await answer.aclose()
    return _Said(text, tokens)
