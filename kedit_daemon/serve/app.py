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
from kedit_daemon.serve.access import Gate, Rate
from kedit_daemon.serve.dashboard import pages
from kedit_daemon.serve.dashboard.pages import Board, Sides
from kedit_daemon.serve.disconnect import GONE
from kedit_daemon.serve.errors import Refused, refusal
from kedit_daemon.serve.health import Health
from kedit_daemon.serve.inference.reader import Reader
from kedit_daemon.serve.inference.types import BASE, EDITED, Opened, Part, Wish
from kedit_daemon.serve.metrics import Metered, Meters
from kedit_daemon.serve.openai.api import Api
from kedit_daemon.serve.post_facts import Facts
from memory.errors import KeditError

if TYPE_CHECKING:
    from policies.stability import Thresholds


def build(
    home: Home,
    config: Config,
    token: str | None,
    clock: Callable[[], datetime],
    monotonic: Callable[[], float],
) -> Starlette:
    """The application, still without a model: `equip` it with one."""
    meters = Meters(CollectorRegistry(), home, clock)
    per_minute = config.serve.requests_per_minute
    rate = Rate(per_minute, monotonic) if per_minute else None
    limited, free = Middleware(Gate, token, rate), Middleware(Gate, token, None)
    app = Starlette(
        routes=[
            *Api(home, config.serve, clock, meters).routes(limited),
            *Facts(home, config).routes(limited),
            *Health(home).routes(free),
            *meters.routes(free),
            *pages.routes(_board(home, clock, monotonic, lambda: app.state.reader), token),
        ],
        middleware=[Middleware(Metered, meters, monotonic)],
        exception_handlers={
            KeditError: _refused,
            HTTPException: _no_such_thing,
            ClientDisconnect: _left,
            Exception: _unexpected,
        },
    )
    app.state.reader, app.state.meters = None, meters
    return app


def equip(app: Starlette, reader: Reader) -> None:
    """Let the application answer with a model from now on."""
    app.state.meters.watch(reader.engine)
    app.state.reader = reader


def _board(
    home: Home,
    clock: Callable[[], datetime],
    monotonic: Callable[[], float],
    reader: Callable[[], Reader | None],
) -> Board:
    """What the pages work with; there is no reader before the model is loaded."""

    async def ask(prompt: str, max_tokens: int) -> Sides:
        if (now := reader()) is None:
            raise KeditError("the model is being loaded", code="loading", exit_code=75)
        wish = Wish(tuple(now.encode(prompt)), EDITED, max_tokens, temperature=0.0)
        sides = (wish, replace(wish, which=BASE))
        answers = [asyncio.ensure_future(_whole(now, one)) for one in sides]
        try:
            (opened, edited), (_, base) = await asyncio.gather(*answers)
        finally:
            for one in answers:  # where one fails, the other is not wanted any more
                one.cancel()
        return Sides(edited, base, opened.generation, opened.fired)

    def thresholds() -> "Thresholds | None":
        return now.thresholds if (now := reader()) else None

    program = f"kedit-daemon --home {shlex.quote(str(home.root))}"
    return Board(home, thresholds, clock, ask, os.environ, program, monotonic)


async def _whole(reader: Reader, wish: Wish) -> tuple[Opened, str]:
    """An answer in one piece, and how it began."""
    async with aclosing(reader.engine.answer(wish)) as answer:
        opened, *parts = [item async for item in answer]
    assert isinstance(opened, Opened)
    return opened, "".join(part.text for part in parts if isinstance(part, Part)).strip()


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, KeditError)
    return refusal(error)


async def _no_such_thing(request: Request, error: Exception) -> Response:
    """No such path, or not by this method."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http")
    what = f"{request.method} {request.scope['path']}: {error.detail}"
    return refusal(Refused(what, status=error.status_code, code=code))


async def _left(request: Request, error: Exception) -> Response:
    """The client left before its body was whole."""
    return Response(status_code=GONE)


async def _unexpected(request: Request, error: Exception) -> Response:
    """Where we are at fault; the traceback goes to the log, and nothing of the request."""
    return refusal(Refused("something unexpected happened", status=500, code="unexpected"))
