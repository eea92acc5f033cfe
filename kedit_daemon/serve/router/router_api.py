"""OpenAI's API in front of engines: what asks for a live fact gets it put in, all else passes as it
is, and so do the answers but for the names of the facts."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx
from pydantic_core import to_json
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from kedit_daemon.config import ServeConfig
from kedit_daemon.serve.disconnect import CLIENT_GONE, run_unless_gone
from kedit_daemon.serve.errors import RequestError
from kedit_daemon.serve.metrics import ServerMetrics
from kedit_daemon.serve.request_body import read_body
from kedit_daemon.serve.router.adapter_answers import AdapterAnswers
from kedit_daemon.serve.router.engine_pool import EnginePool, Headers
from kedit_daemon.serve.router.named_answers import (
    CONNECTION_HEADERS,
    NamedFacts,
    PassedAnswer,
    name_facts,
)
from kedit_daemon.serve.router.routed_request import (
    ADAPTER_PREFIX,
    FindFacts,
    RoutedRequest,
    add_chat_facts,
    add_text_facts,
    find_chat_facts,
    find_text_facts,
    read_request,
)
from memory.errors import KeditError

if TYPE_CHECKING:  # they import torch, and the server answers before that is loaded
    from kedit_daemon.serve.router.routed_facts import RoutedFact, RoutedFacts

LOADING = "the facts are being loaded"
# Headers that are about this server: its pages' sign-in, and which page asks.
CLIENT_HEADERS = {b"cookie", b"origin", b"referer", b"accept-encoding"}
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

    def __init__(
        self, config: ServeConfig, engines: EnginePool, metrics: ServerMetrics, token: str | None
    ) -> None:
        """`token`: of this server's clients, if they need one."""
        self.config, self.engines, self.metrics, self.token = config, engines, metrics, token
        self.facts: RoutedFacts | None = None
        """The facts; None while they are being loaded."""
        self.adapters: AdapterAnswers | None = None
        """Answers by the adapters of facts; None where facts are told in the prompt."""
        self._reading = ThreadPoolExecutor(1, "router")  # of the facts, by one thread at a time

    def build_routes(self, gate: Middleware) -> list[Route]:
        """Return the routes of the endpoints, behind a gate."""
        return [
            Route("/v1/models", self.list_models, middleware=[gate]),
            Route("/v1/models/{name:path}", self.get_model, middleware=[gate]),
            Route("/v1/completions", self.create_completion, methods=["POST"], middleware=[gate]),
            Route("/v1/chat/completions", self.create_chat, methods=["POST"], middleware=[gate]),
        ]

    async def check_state(self) -> tuple[list[str], dict[str, Any]]:
        """Return why prompts are not answered, and what they are answered with."""
        silent = await self.engines.find_silent()
        reasons = silent if len(silent) == len(self.engines.urls) else []
        if (facts := self.facts) is None:
            return [LOADING, *reasons], {"problems": silent}
        problems = [*silent, *([facts.problem] if facts.problem else [])]
        state = {"generation": facts.generation, "facts": len(facts), "problems": problems}
        return reasons, state

    async def close(self) -> None:
        """Close the database and all connections."""
        self._reading.shutdown()
        if self.facts is not None:
            self.facts.close()
        await self.engines.close()

    async def list_models(self, request: Request) -> Response:
        """List the engine's models."""
        return await self._get(request, "/v1/models")

    async def get_model(self, request: Request) -> Response:
        """Return one model of the list."""
        name = request.path_params["name"]
        if {".", ".."} & set(name.split("/")):  # it would be another path
            raise KeditError(f"there is no model {name!r} here", code="model")
        return await self._get(request, f"/v1/models/{quote(name)}")

    async def _get(self, request: Request, path: str) -> Response:
        sending = self.engines.send("GET", path, self._select_headers(request), b"", "")
        answer = await run_unless_gone(request, sending)
        return PassedAnswer(answer, {}) if answer else Response(status_code=CLIENT_GONE)

    async def create_completion(self, request: Request) -> Response:
        """Continue a text."""
        return await self._answer_request(request, TEXT, "/v1/completions")

    async def create_chat(self, request: Request) -> Response:
        """Continue a conversation."""
        return await self._answer_request(request, CHAT, "/v1/chat/completions")

    async def _answer_request(self, request: Request, form: PromptForm, path: str) -> Response:
        routed = read_request(await read_body(request, self.config.max_body_bytes))
        if routed.model.startswith(ADAPTER_PREFIX):  # a fact that was reverted may still be there
            raise KeditError(f"there is no model {routed.model!r} here", code="model")
        named = await self.find_facts(routed, form)
        headers = self._select_headers(request)
        asking = self.ask_engine(routed, form, named, path, headers)
        answered = await run_unless_gone(request, asking)
        if answered is None:
            return Response(status_code=CLIENT_GONE)
        answer, named = answered
        self.metrics.routed_counter.labels(named.by).inc()
        return await name_facts(answer, named)

    async def ask_engine(
        self,
        routed: RoutedRequest,
        form: PromptForm,
        named: NamedFacts,
        path: str,
        headers: Headers,
    ) -> tuple[httpx.Response, NamedFacts]:
        """Send a request with its facts: by adapters where they have some that the engine takes,
        else in the prompt. Return the answer, and what of the facts is in it."""

        def send(body: bytes) -> Awaitable[httpx.Response]:
            return self.engines.send("POST", path, headers, body, routed.conversation)

        if not named.by_prompt:
            return await send(routed.plain_body), named
        if (adapters := self.adapters) is not None:
            # Its id would be that of two requests.
            headers = [(name, value) for name, value in headers if name != b"x-request-id"]
            answer_by = adapters.answer_chat if form is CHAT else adapters.answer_text
            list_models = partial(self.engines.list_models, headers)
            answered = await answer_by(send, list_models, routed.fields, named)
            if answered is not None:
                return answered
        if routed.fields.get("echo"):  # scores of the prompt's own tokens
            return await send(routed.plain_body), replace(named, by_prompt=())
        return await send(to_json(form.add_facts(routed.fields, named.by_prompt))), named

    async def find_facts(self, routed: RoutedRequest, form: PromptForm) -> NamedFacts:
        """Find the facts that a request asks for. Raises RequestError (503) while they are being
        loaded."""
        if (facts := self.facts) is None:
            raise RequestError(LOADING, status=503, code="loading", retry=5)

        def find() -> NamedFacts:
            facts.sync()
            found = [] if routed.is_for_base else form.find_facts(facts, routed.fields)
            return NamedFacts(facts.generation, found if any(found) else [], routed.choices)

        return await asyncio.get_running_loop().run_in_executor(self._reading, find)

    def _select_headers(self, request: Request) -> Headers:
        """Return a request's headers that are for the engine."""
        connection = request.headers.get("connection", "").lower().encode("latin-1")
        dropped = CONNECTION_HEADERS | CLIENT_HEADERS | {n.strip() for n in connection.split(b",")}
        if self.token is not None:  # it is ours, and none of the engine's
            dropped.add(b"authorization")
        kept = [(name, value) for name, value in request.headers.raw if name not in dropped]
        return [*kept, (b"accept-encoding", b"identity")]
