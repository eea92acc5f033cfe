"""The HTTP application, put together from its parts."""

from collections.abc import Callable
from datetime import datetime

from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response

from kedit_daemon.config import Config
from kedit_daemon.home import Home
from kedit_daemon.serve.api import Api
from kedit_daemon.serve.facts import Facts
from kedit_daemon.serve.gate import Gate, Rate
from kedit_daemon.serve.health import Health
from kedit_daemon.serve.metrics import Metered, Meters
from kedit_daemon.serve.reader import Reader
from kedit_daemon.serve.refusals import Refused, refusal
from memory.errors import KeditError


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
        ],
        middleware=[Middleware(Metered, meters, monotonic)],
        exception_handlers={
            KeditError: _refused,
            HTTPException: _no_such_thing,
            Exception: _unexpected,
        },
    )
    app.state.reader, app.state.meters = None, meters
    return app


def equip(app: Starlette, reader: Reader) -> None:
    """Let the application answer with a model from now on."""
    app.state.meters.watch(reader.engine)
    app.state.reader = reader


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, KeditError)
    return refusal(error)


async def _no_such_thing(request: Request, error: Exception) -> Response:
    """No such path, or not by this method."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http")
    what = f"{request.method} {request.url.path}: {error.detail}"
    return refusal(Refused(what, status=error.status_code, code=code))


async def _unexpected(request: Request, error: Exception) -> Response:
    """Where we are at fault; the traceback goes to the log, and nothing of the request."""
    return refusal(Refused("something unexpected happened", status=500, code="unexpected"))
