"""Whether the process lives, and whether it can answer."""

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
    """The endpoints for whoever starts, stops and watches the server."""

    def __init__(self, home: Home) -> None:
        self.home = home

    def build_routes(self, gate: Middleware) -> list[Route]:
        """Where they are; whether the process lives may be asked by anybody."""
        return [
            Route("/health", self.answer_health),
            Route("/ready", self.answer_ready, middleware=[gate]),
        ]

    async def answer_health(self, request: Request) -> Response:
        """The process lives."""
        return JSONResponse({"status": "ok"})

    async def answer_ready(self, request: Request) -> Response:
        """Whether questions are answered and facts are taken; with the reasons when not."""
        reader: Reader | None = request.app.state.reader
        reasons = [] if reader else ["the model is being loaded"]
        if why := await run_in_threadpool(self._find_daemon_problem):
            reasons.append(why)
        told: dict[str, Any] = {"ready": not reasons, "reasons": reasons}
        if reader is not None:
            figures = reader.engine.status
            # What could not be followed is left as it was: answers are given all the same.
            told |= {"generation": figures.generation, "problems": list(figures.problems)}
        return JSONResponse(told, 503 if reasons else 200)

    def _find_daemon_problem(self) -> str | None:
        """What is the matter with the daemon, if something is."""
        try:
            send_request(self.home.socket_file, PING, {}, PING_SECONDS)
        except KeditError as error:
            return str(error)
        return None
