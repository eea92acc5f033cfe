"""The HTTP application, put together from its parts."""

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
from kedit_daemon.serve.dashboard import pages
from kedit_daemon.serve.dashboard.pages import AnswerPair, DashboardContext
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
from memory.errors import KeditError

if TYPE_CHECKING:
    from policies.stability import Thresholds


def build_app(
    home: Home,
    config: Config,
    token: str | None,
    clock: Callable[[], datetime],
    monotonic: Callable[[], float],
) -> Starlette:
    """The application, still without a model: `equip` it with one."""
    meters = ServerMetrics(CollectorRegistry(), home, clock)
    per_minute = config.serve.requests_per_minute
    rate = RateLimiter(per_minute, monotonic) if per_minute else None
    limited, free = Middleware(AccessGate, token, rate), Middleware(AccessGate, token, None)
    app = Starlette(
        routes=[
            *OpenAIApi(home, config.serve, clock, meters).build_routes(limited),
            *FactsEndpoint(home, config).build_routes(limited),
            *HealthEndpoints(home).build_routes(free),
            *meters.build_routes(free),
            *pages.build_routes(
                _dashboard_context(home, clock, monotonic, lambda: app.state.reader), token
            ),
        ],
        middleware=[Middleware(MetricsMiddleware, meters, monotonic)],
        exception_handlers={
            KeditError: _handle_kedit_error,
            HTTPException: _handle_http_error,
            ClientDisconnect: _handle_disconnect,
            Exception: _handle_unexpected,
        },
    )
    app.state.reader, app.state.meters = None, meters
    return app


def attach_reader(app: Starlette, reader: Reader) -> None:
    """Let the application answer with a model from now on."""
    app.state.meters.watch(reader.engine)
    app.state.reader = reader


def _dashboard_context(
    home: Home,
    clock: Callable[[], datetime],
    monotonic: Callable[[], float],
    reader: Callable[[], Reader | None],
) -> DashboardContext:
    """What the pages work with; there is no reader before the model is loaded."""

    async def ask(prompt: str, max_tokens: int) -> AnswerPair:
        if (now := reader()) is None:
            raise KeditError("the model is being loaded", code="loading")
        wish = GenerationRequest(tuple(now.encode(prompt)), EDITED, max_tokens, temperature=0.0)
        sides = (wish, replace(wish, variant=BASE))
        answers = [asyncio.ensure_future(_collect_answer(now, one)) for one in sides]
        try:
            (opened, edited), (_, base) = await asyncio.gather(*answers)
        finally:
            for one in answers:  # where one fails, the other is not wanted any more
                one.cancel()
        return AnswerPair(edited, base, opened.generation, opened.fired)

    def thresholds() -> "Thresholds | None":
        return now.thresholds if (now := reader()) else None

    program = f"kedit-daemon --home {shlex.quote(str(home.root))}"
    return DashboardContext(home, thresholds, clock, ask, os.environ, program, monotonic)


async def _collect_answer(reader: Reader, wish: GenerationRequest) -> tuple[AnswerStart, str]:
    """An answer in one piece, and how it began."""
    async with aclosing(reader.engine.stream_answer(wish)) as answer:
        opened, *parts = [item async for item in answer]
    assert isinstance(opened, AnswerStart)
    return opened, "".join(part.text for part in parts if isinstance(part, AnswerPart)).strip()


async def _handle_kedit_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, KeditError)
    return error_response(error)


async def _handle_http_error(request: Request, error: Exception) -> Response:
    """No such path, or not by this method."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http")
    what = f"{request.method} {request.scope['path']}: {error.detail}"
    return error_response(RequestError(what, status=error.status_code, code=code))


async def _handle_disconnect(request: Request, error: Exception) -> Response:
    """The client left before its body was whole."""
    return Response(status_code=CLIENT_GONE)


async def _handle_unexpected(request: Request, error: Exception) -> Response:
    """Where we are at fault; the traceback goes to the log, and nothing of the request."""
    return error_response(
        RequestError("something unexpected happened", status=500, code="unexpected")
    )
