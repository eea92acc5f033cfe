"""OpenAI's API in front of engines: what asks for a live fact gets it put in, all else passes as it
is, and so do the answers but for the names of the facts."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
from pydantic_core import to_json
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kedit_daemon.config import ServeConfig
from kedit_daemon.serve.disconnect import CLIENT_GONE, run_unless_gone
from kedit_daemon.serve.errors import RequestError
from kedit_daemon.serve.request_body import read_body
from kedit_daemon.serve.router.adapter_answers import AdapterAnswers, SendBody
from kedit_daemon.serve.router.engine_pool import EnginePool
from kedit_daemon.serve.router.named_answers import (
    DROPPED_HEADERS,
    NamedFacts,
    PassedAnswer,
    name_facts,
)
from kedit_daemon.serve.router.routed_request import (
    FindFacts,
    RoutedRequest,
    add_chat_facts,
    add_text_facts,
    find_chat_facts,
    find_text_facts,
    read_request,
)

if TYPE_CHECKING:  # they import torch, and the server answers before that is loaded
    from kedit_daemon.serve.router.routed_facts import RoutedFact, RoutedFacts

AddFacts = Callable[[dict[str, Any], "Sequence[Sequence[RoutedFact]]"], dict[str, Any]]


@dataclass(frozen=True)
class PromptForm:
    """How prompts of an endpoint are read, and how facts are put into them."""

    find_facts: FindFacts
    add_facts: AddFacts


CHAT = PromptForm(find_chat_facts, add_chat_facts)
TEXT = PromptForm(find_text_facts, add_text_facts)


class RouterApi:
    """The endpoints. Prompts and answers are neither kept nor logged."""

    def __init__(self, config: ServeConfig, engines: EnginePool, token: str | None = None) -> None:
        """`token`: of this server's clients, if they need one."""
        self.config, self.engines, self.token = config, engines, token
        self.facts: RoutedFacts | None = None
        """The facts; None while they are being loaded."""
        self.adapters: AdapterAnswers | None = None
        """Answers by the adapters of facts; None where facts are told in the prompt."""
        self._reading = ThreadPoolExecutor(1, "router")  # of the facts, by one thread at a time

    def build_routes(self, gate: Middleware) -> list[Route]:
        """Return the routes of the endpoints, behind a gate."""
        return [
            Route("/v1/models", self.pass_on, middleware=[gate]),
            Route("/v1/models/{name:path}", self.pass_on, middleware=[gate]),
            Route("/v1/completions", self.create_completion, methods=["POST"], middleware=[gate]),
            Route("/v1/chat/completions", self.create_chat, methods=["POST"], middleware=[gate]),
        ]

    async def find_reasons(self) -> list[str]:
        """Return why prompts are not answered."""
        silent = await self.engines.find_silent()
        reasons = silent if len(silent) == len(self.engines.urls) else []
        return reasons if self.facts else ["the facts are being loaded", *reasons]

    async def describe_state(self) -> dict[str, Any]:
        """Return what is answered with, and what is wrong with it."""
        problems = await self.engines.find_silent()
        if (facts := self.facts) is None:
            return {"problems": problems}
        problems += [facts.problem] if facts.problem else []
        return {"generation": facts.generation, "facts": len(facts), "problems": problems}

    async def close(self) -> None:
        """Close the database and all connections."""
        self._reading.shutdown()
        if self.facts is not None:
            self.facts.close()
        await self.engines.close()

    async def pass_on(self, request: Request) -> Response:
        """Answer as the engine does."""
        return PassedAnswer(await self._send(request, b"", ""), {})

    async def create_completion(self, request: Request) -> Response:
        """Continue a text."""
        return await self._answer_request(request, TEXT)

    async def create_chat(self, request: Request) -> Response:
        """Continue a conversation."""
        return await self._answer_request(request, CHAT)

    async def _answer_request(self, request: Request, form: PromptForm) -> Response:
        routed = read_request(await read_body(request, self.config.max_body_bytes))
        named = await self.find_facts(routed, form)

        def send(body: bytes) -> Awaitable[httpx.Response]:
            return self._send(request, body, routed.conversation)

        answered = await run_unless_gone(request, self.ask_engine(routed, form, named, send))
        if answered is None:
            return Response(status_code=CLIENT_GONE)
        return await name_facts(*answered)

    async def ask_engine(
        self, routed: RoutedRequest, form: PromptForm, named: NamedFacts, send: SendBody
    ) -> tuple[httpx.Response, NamedFacts]:
        """Send a request with its facts: by adapters where they have some that the engine takes,
        else in the prompt."""
        if not named.by_prompt:
            return await send(routed.plain_body), named
        if (adapters := self.adapters) is not None:
            answer_by = adapters.answer_chat if form is CHAT else adapters.answer_text
            if (answered := await answer_by(send, routed.fields, named)) is not None:
                return answered
        return await send(to_json(form.add_facts(routed.fields, named.by_prompt))), named

    async def find_facts(self, routed: RoutedRequest, form: PromptForm) -> NamedFacts:
        """Find the facts that a request asks for. Raises RequestError (503) while they are being
        loaded."""
        if (facts := self.facts) is None:
            message = "the facts are being loaded"
            raise RequestError(message, status=503, code="loading", retry=5)

        def find() -> NamedFacts:
            facts.sync()
            found = [] if routed.is_for_base else form.find_facts(facts, routed.fields)
            return NamedFacts(facts.generation, found if any(found) else [], routed.choices)

        return await asyncio.get_running_loop().run_in_executor(self._reading, find)

    async def _send(self, request: Request, body: bytes, conversation: str) -> httpx.Response:
        scope = request.scope
        path = scope["path"] + (f"?{query}" if (query := scope["query_string"].decode()) else "")
        headers = {n: v for n, v in request.headers.items() if n not in DROPPED_HEADERS}
        if self.token is not None:  # it is ours, and none of the engine's
            headers.pop("authorization", None)
        return await self.engines.send(request.method, path, headers, body, conversation)
