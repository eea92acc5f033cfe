"""A question of the dashboard, answered by an engine with the facts asked for, and without."""

import asyncio
from typing import Any

from pydantic_core import from_json, to_json

from kedit_daemon.serve.dashboard.ask_page import AnswerPair, AskedPrompt
from kedit_daemon.serve.router.routed_request import read_request
from kedit_daemon.serve.router.router_api import CHAT, TEXT, RouterApi
from memory.errors import BadRequest

MAX_ERROR_CHARS = 300  # of an engine's


async def ask_engines(router: RouterApi, asked: AskedPrompt, max_tokens: int) -> AnswerPair:
    """Answer a prompt with its facts and without. Raises KeditError: the engine refuses it
    ("bad-request"), or none answers."""
    form, path = (CHAT, "/v1/chat/completions") if asked.is_chat else (TEXT, "/v1/completions")
    fields: dict[str, Any] = {"model": await _read_model_name(router), "temperature": 0}
    fields |= {"messages": asked.messages} if asked.is_chat else {"prompt": asked.text}
    fields["max_tokens"] = max_tokens
    named = await router.find_facts(read_request(to_json(fields)), form)
    edited = form.add_facts(fields, named.by_prompt) if named.by_prompt else fields
    said, base = await asyncio.gather(_ask(router, path, edited), _ask(router, path, fields))
    facts = tuple(one.fact.id for found in named.by_prompt for one in found)
    return AnswerPair(said, base, named.generation, facts)


async def _read_model_name(router: RouterApi) -> str:
    listed = await _read_answer(router, "GET", "/v1/models", b"")
    return str(listed["data"][0]["id"])


async def _ask(router: RouterApi, path: str, fields: dict[str, Any]) -> str:
    choice = (await _read_answer(router, "POST", path, to_json(fields)))["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    return str(text or "").strip()


async def _read_answer(router: RouterApi, method: str, path: str, body: bytes) -> Any:
    headers = {"content-type": "application/json"}
    answer = await router.engines.send(method, path, headers, body, "")
    try:
        content = await answer.aread()
    finally:
        await answer.aclose()
    if answer.is_error:
        why = content[:MAX_ERROR_CHARS].decode(errors="replace")
        raise BadRequest(f"the engine refuses it: {why}")
    return from_json(content)
