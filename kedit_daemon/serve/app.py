"""The HTTP application, composed of its parts."""

import asyncio
import os
import shlex
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from kedit_daemon.config import Config
from kedit_daemon.home import Home
from kedit_daemon.serve.access import AccessGate, RateLimiter
from kedit_daemon.serve.cors import ApiCors
from kedit_daemon.serve.dashboard import pages
from kedit_daemon.serve.dashboard.ask_page import AnswerPair, AskedPrompt
from kedit_daemon.serve.dashboard.pages import DashboardContext
from kedit_daemon.serve.disconnect import CLIENT_GONE
from kedit_daemon.serve.errors import RequestError, error_response
from kedit_daemon.serve.health import HealthEndpoints
from kedit_daemon.serve.inference.reader import Reader
from kedit_daemon.serve.inference.types import (
    BASE,
    EDITED,
    AnswerPart,
    AnswerStart,
    GenerationRequest,
)
from kedit_daemon.serve.metrics import MetricsMiddleware, ServerMetrics
from kedit_daemon.serve.openai.api import OpenAIApi
from kedit_daemon.serve.post_facts import FactsEndpoint
from kedit_daemon.serve.router.ask_engines import ask_engines
from kedit_daemon.serve.router.engine_pool import EnginePool
from kedit_daemon.serve.router.router_api import RouterApi
from memory.errors import KeditError
from memory.model.chat_layout import write_chat

if TYPE_CHECKING:
    from policies.health_limits import Thresholds


def build_app(
    home: Home,
    config: Config,
    token: str | None,
    clock: Callable[[], datetime],
    monotonic: Callable[[], float],
) -> Starlette:
    """Build the application, still without a model: `attach_reader` adds it."""
    metrics = ServerMetrics(CollectorRegistry(), home, clock)
    per_minute = config.serve.requests_per_minute
    rate = RateLimiter(per_minute, monotonic) if per_minute else None
    origins = config.serve.allowed_origins
    limited = Middleware(AccessGate, token, rate, origins)
    free = Middleware(AccessGate, token, None, origins)
    router = _make_router(config, metrics, token, monotonic)
    api = router or OpenAIApi(home, config.serve, clock, metrics)
    context = _dashboard_context(home, clock, monotonic, lambda: app.state.reader, router)
    app = Starlette(
        routes=[
            *api.build_routes(limited),
            *FactsEndpoint(home, config).build_routes(limited),
            *HealthEndpoints(home).build_routes(free),
            *metrics.build_routes(free),
            *pages.build_routes(context, token),
        ],
        middleware=[
            Middleware(MetricsMiddleware, metrics, monotonic),
            *([Middleware(ApiCors, origins)] if origins else []),
        ],
        exception_handlers={
            KeditError: _handle_kedit_error,
            HTTPException: _handle_http_error,
            ClientDisconnect: _handle_disconnect,
            Exception: _handle_unexpected,
        },
    )
    app.state.reader, app.state.metrics, app.state.router = None, metrics, router
    return app


def _make_router(
    config: Config, metrics: ServerMetrics, token: str | None, monotonic: Callable[[], float]
) -> RouterApi | None:
    """Make the router to the engines that answer; None where this server does."""
    urls = config.serve.engine
    if not urls:
        return None
    return RouterApi(config.serve, EnginePool(urls, monotonic), metrics, token)


def attach_reader(app: Starlette, reader: Reader) -> None:
    """Set the model with which the application answers."""
    app.state.metrics.watch_engine(reader.engine)
    app.state.reader = reader


def _dashboard_context(
    home: Home,
    clock: Callable[[], datetime],
    monotonic: Callable[[], float],
    get_reader: Callable[[], Reader | None],
    router: RouterApi | None,
) -> DashboardContext:
    """Return what the dashboard works with; there is no reader before the model is loaded, or where
    a router answers."""

    async def ask_both(asked: AskedPrompt, max_tokens: int) -> AnswerPair:
        if router is not None:
            return await ask_engines(router, asked, max_tokens)
        if (reader := get_reader()) is None:
            raise KeditError("the model is being loaded", code="loading")
        text = asked.text
        if asked.is_chat:
            text = write_chat(reader.model.tokenizer, asked.messages)
        request = GenerationRequest(tuple(reader.encode(text)), EDITED, max_tokens, 0.0)
        tasks = [
            asyncio.ensure_future(_collect_answer(reader, replace(request, variant=variant)))
            for variant in (EDITED, BASE)
        ]
        try:
            (edited, generation, facts), (base, *_) = await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # if one fails, the other is not needed any more
                task.cancel()
        return AnswerPair(edited, base, generation, facts)

    def get_thresholds() -> "Thresholds | None":
        return reader.thresholds if (reader := get_reader()) else None

    program = f"kedit-daemon --home {shlex.quote(str(home.root))}"
    return DashboardContext(home, get_thresholds, clock, ask_both, os.environ, program, monotonic)


async def _collect_answer(
    reader: Reader, request: GenerationRequest
) -> tuple[str, int, tuple[str, ...]]:
    """Return the whole text of an answer, the generation, and the ids of the facts that fired."""
    async with aclosing(reader.engine.stream_answer(request)) as answer:
        start, *parts = [item async for item in answer]
    assert isinstance(start, AnswerStart)
    said = [part for part in parts if isinstance(part, AnswerPart)]
    matches = [start.fired, *(match for part in said for _, match in part.fired)]
    facts = dict.fromkeys(match.fact_id for match in matches if match is not None)
    return "".join(part.text for part in said).strip(), start.generation, tuple(facts)


async def _handle_kedit_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, KeditError)
    return error_response(error)


async def _handle_http_error(request: Request, error: Exception) -> Response:
    """Answer that there is no such path, or not by this method."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http")
    message = f"{request.method} {request.scope['path']}: {error.detail}"
    return error_response(RequestError(message, status=error.status_code, code=code))


async def _handle_disconnect(request: Request, error: Exception) -> Response:
    """End a request whose client left before its body was whole."""
    return Response(status_code=CLIENT_GONE)


async def _handle_unexpected(request: Request, error: Exception) -> Response:
    """Answer an unexpected error; Starlette logs the traceback, but nothing of the request."""
    message = "something unexpected happened"
    return error_response(RequestError(message, status=500, code="unexpected"))
