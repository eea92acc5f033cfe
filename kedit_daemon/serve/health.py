"""The health endpoints: the process lives; the server can answer."""

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kedit_daemon.control import PING, send_request
from kedit_daemon.home import Home
from kedit_daemon.serve.inference.reader import Reader
from kedit_daemon.serve.router.router_api import RouterApi
from memory.errors import KeditError

PING_SECONDS = 2.0


class HealthEndpoints:
    """Endpoints for programs that start, stop and watch the server."""

    def __init__(self, home: Home) -> None:
        self.home = home

    def build_routes(self, gate: Middleware) -> list[Route]:
        """Return the routes; anybody may ask whether the process lives."""
        return [
            Route("/health", self.answer_health),
            Route("/ready", self.answer_ready, middleware=[gate]),
        ]

    async def answer_health(self, request: Request) -> Response:
        """Answer that the process lives."""
        return JSONResponse({"status": "ok"})

    async def answer_ready(self, request: Request) -> Response:
        """Answer whether prompts are answered and facts are taken, with the reasons if not."""
        reasons, state = await _describe_answering(request.app.state)
        try:
            await run_in_threadpool(send_request, self.home.socket_file, PING, {}, PING_SECONDS)
        except KeditError as error:
            reasons.append(str(error))
        # Problems do not count: the server answers with the last state that it could load.
        body = {"ready": not reasons, "reasons": reasons, **state}
        return JSONResponse(body, 503 if reasons else 200)


async def _describe_answering(state: State) -> tuple[list[str], dict[str, Any]]:
    """Return why prompts are not answered, and the state of what answers them."""
    router: RouterApi | None = state.router
    if router is not None:
        return await router.check_state()
    reader: Reader | None = state.reader
    if reader is None:
        return ["the model is being loaded"], {}
    status = reader.engine.status
    return [], {"generation": status.generation, "problems": list(status.problems)}
