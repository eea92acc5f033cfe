"""The health endpoints: the process lives; the server can answer."""

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from kedit_daemon.control import PING, send_request
from kedit_daemon.home import Home
from kedit_daemon.serve.inference.reader import Reader
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
        reader: Reader | None = request.app.state.reader
        reasons = [] if reader else ["the model is being loaded"]
        try:
            await run_in_threadpool(send_request, self.home.socket_file, PING, {}, PING_SECONDS)
        except KeditError as error:
            reasons.append(str(error))
        body: dict[str, Any] = {"ready": not reasons, "reasons": reasons}
        if reader is not None:
            status = reader.engine.status
            # Problems do not count: the server answers with the last state that it could load.
            body |= {"generation": status.generation, "problems": list(status.problems)}
        return JSONResponse(body, 503 if reasons else 200)
