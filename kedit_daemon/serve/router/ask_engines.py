"""A question of the dashboard, answered by an engine with the facts asked for, and without."""

import asyncio
from dataclasses import replace
from typing import Any

import httpx
from pydantic_core import from_json, to_json

from kedit_daemon.serve.dashboard.ask_page import AnswerPair, AskedPrompt
from kedit_daemon.serve.router.named_answers import NamedFacts
from kedit_daemon.serve.router.routed_request import read_request
from kedit_daemon.serve.router.router_api import CHAT, TEXT, RouterApi
from memory.errors import BadRequest

MAX_ERROR_CHARS = 300  # of an engine's
HEADERS = [(b"content-type", b"application/json"), (b"accept-encoding", b"identity")]


async def ask_engines(router: RouterApi, asked: AskedPrompt, max_tokens: int) -> AnswerPair:
    """Answer a prompt with its facts and without. Raises KeditError: the engine refuses it
    ("bad-request"), or none answers."""
    form, path = (CHAT, "/v1/chat/completions") if asked.is_chat else (TEXT, "/v1/completions")
    fields: dict[str, Any] = {"model": await _read_model_name(router), "temperature": 0}
    fields |= {"messages": asked.messages} if asked.is_chat else {"prompt": asked.text}
    routed = read_request(to_json({**fields, "max_tokens": max_tokens}))
    named = await router.find_facts(routed, form)

    async def ask(facts: NamedFacts) -> str:
        answer, said = await router.ask_engine(routed, form, facts, path, HEADERS)
        choice = said.complete_body(await _read_answer(answer))["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        return str(text or "").strip()

    said, base = await asyncio.gather(ask(named), ask(replace(named, by_prompt=())))
    facts = tuple(one.fact.id for one in named.distinct)
    return AnswerPair(said, base, named.generation, facts)


async def _read_model_name(router: RouterApi) -> str:
    names = list(await router.engines.list_models(HEADERS))
    if not names:
        raise BadRequest("the engine does not say which models it has")
    return names[0]


async def _read_answer(answer: httpx.Response) -> Any:
    try:
        content = await answer.aread()
    finally:
        await answer.aclose()
    if answer.is_error:
        why = content[:MAX_ERROR_CHARS].decode(errors="replace")
        raise BadRequest(f"the engine refuses it: {why}")
    return from_json(content)
