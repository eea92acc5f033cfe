"""Answers by the adapters of facts, as the daemon's own server gives them: a fact's shard acts
until its target is said, then it is released, and the model goes on in its own words.

An adapter acts on a whole request. So a chat's reply takes a request for each fact, by an adapter
which says the target, and one more to the model itself, which goes on from there. A completion
takes one alone: there a shard has learned that the text ends behind its target.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
from pydantic_core import to_json

from kedit_daemon.serve.router.event_lines import read_event, split_lines
from kedit_daemon.serve.router.named_answers import NamedFacts
from memory.errors import KeditError

if TYPE_CHECKING:  # it imports torch
    from kedit_daemon.serve.router.fact_adapters import FactAdapters
    from kedit_daemon.serve.router.routed_facts import RoutedFact

TARGET_TOKENS = 128  # in which a target must be said
# Fields that make more of a reply than text, by the names that vLLM, SGLang and llama-server have.
STRUCTURED_FIELDS = (
    *("tools", "functions", "response_format", "structured_outputs", "logprobs", "logit_bias"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("json_schema", "regex", "ebnf", "grammar"),
)
LIMITS = ("max_completion_tokens", "max_tokens")
# How an adapter is asked: by itself, for the likeliest text, until the router has heard enough.
LEFT_OUT = {
    *("stream_options", "stop", "min_tokens", "presence_penalty", "frequency_penalty", "n"),
    *LIMITS,
}
ASKED_BY: Mapping[str, Any] = {"stream": True, "temperature": 0, "max_tokens": TARGET_TOKENS}
SendBody = Callable[[bytes], Awaitable[httpx.Response]]
ListModels = Callable[[], Awaitable[dict[str, str]]]
log = logging.getLogger(__name__)


class AdapterAnswers:
    """Answers requests by adapters, where their facts have some that the engines take."""

    def __init__(self, adapters: "FactAdapters") -> None:
        self._adapters = adapters
        self._roots: dict[str, str] = {}  # what the engines have loaded, by the models' names

    async def answer_chat(
        self, send: SendBody, list_models: ListModels, fields: dict[str, Any], named: NamedFacts
    ) -> tuple[httpx.Response, NamedFacts] | None:
        """Answer a conversation; None where that cannot be done by adapters: one does not say its
        target, or the client has set limits that such an answer would not keep."""
        if any(fields.get(name) for name in STRUCTURED_FIELDS):
            return None
        said, tokens = "", 0
        for fact in named.distinct:
            begun = f"{said}\n" if said else ""
            if (adapter := await self._make_adapter(fact, list_models, fields)) is None:
                return None
            asked = {n: v for n, v in _begin_reply(fields, begun).items() if n not in LEFT_OUT}
            asked |= {"model": adapter, **ASKED_BY}
            heard = await self._take_answer(await send(to_json(asked)))
            spoken = None if heard is None else await _count_tokens_to(heard, fact.fact.target)
            if spoken is None:
                return None
            said, tokens = begun + fact.fact.target, tokens + spoken
        if _breaks_limits(fields, said, tokens):
            return None
        answer = await self._take_answer(await send(to_json(_go_on(fields, said, tokens))))
        return None if answer is None else (answer, replace(named, said=said, tokens=tokens))

    async def answer_text(
        self, send: SendBody, list_models: ListModels, fields: dict[str, Any], named: NamedFacts
    ) -> tuple[httpx.Response, NamedFacts] | None:
        """Continue a text; None where that cannot be done by an adapter, such as for several."""
        if len(named.by_prompt) != 1 or any(fields.get(name) for name in STRUCTURED_FIELDS):
            return None
        (fact,) = named.distinct
        if (adapter := await self._make_adapter(fact, list_models, fields)) is None:
            return None
        answer = await self._take_answer(await send(to_json({**fields, "model": adapter})))
        return None if answer is None else (answer, replace(named, model=str(fields["model"])))

    async def _make_adapter(
        self, fact: "RoutedFact", list_models: ListModels, fields: dict[str, Any]
    ) -> str | None:
        """Return the name of a fact's adapter; None where there can be none."""
        model = str(fields.get("model"))
        if model not in self._roots:
            self._roots |= await list_models()
        if (base := self._roots.get(model)) is None:
            return None  # the engine says that there is no such model
        try:
            return await asyncio.to_thread(self._adapters.make_adapter, fact, base)
        except (OSError, KeditError) as error:
            log.warning("No adapter can be made: %s", error)
            return None

    async def _take_answer(self, answer: httpx.Response) -> httpx.Response | None:
        """Return an answer of an engine; None if it is an error, which is closed."""
        if not answer.is_error:
            return answer
        await answer.aclose()
        log.warning(
            "The engine answers %d to an adapter, or to a reply that has begun: the fact is told"
            " in the prompt",
            answer.status_code,
        )
        self._roots.clear()  # it may have been started anew, from elsewhere
        return None


def _begin_reply(fields: dict[str, Any], said: str) -> dict[str, Any]:
    """Return the fields of a conversation whose reply has begun, if it has."""
    if not said:
        return fields
    turns = [*fields["messages"], {"role": "assistant", "content": said}]
    begun = {"continue_final_message": True, "add_generation_prompt": False}
    return {**fields, "messages": turns, **begun}


def _breaks_limits(fields: dict[str, Any], said: str, tokens: int) -> bool:
    """Check that what was said is longer than an answer may be, or should have ended it."""
    limits = [fields[name] for name in LIMITS if isinstance(fields.get(name), int)]
    stop = fields.get("stop") or []
    stops = [stop] if isinstance(stop, str) else stop
    return any(limit <= tokens for limit in limits) or any(str(text) in said for text in stops)


def _go_on(fields: dict[str, Any], said: str, tokens: int) -> dict[str, Any]:
    """Return the fields of the conversation that goes on behind what was said in some tokens."""
    limits = {n: fields[n] - tokens for n in LIMITS if isinstance(fields.get(n), int)}
    return {**_begin_reply(fields, said), **limits}


async def _count_tokens_to(answer: httpx.Response, target: str) -> int | None:
    """Listen to a stream until it has said a target; return the number of its events until then,
    one a token. None if it says something else, or breaks off."""
    text, tokens = "", 0
    try:
        async with aclosing(split_lines(answer.aiter_bytes())) as lines:
            async for line in lines:
                for choice in (read_event(line) or {}).get("choices", ()):
                    piece = choice["delta"].get("content") or ""
                    text, tokens = text + piece, tokens + bool(piece)
                if text.lstrip().startswith(target):
                    return tokens
                if not target.startswith(text.strip()):
                    return None
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("An adapter's answer cannot be read: %r", error)
    finally:
        await answer.aclose()
    return None
