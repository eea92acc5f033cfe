"""The main program of the HTTP server's process: `python -m kedit_daemon.serve.worker`."""

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from kedit_daemon.config import Config
from kedit_daemon.home import Home
from kedit_daemon.serve.app import attach_reader, build_app
from kedit_daemon.serve.inference.reader import Reader
from kedit_daemon.serve.router.router_api import RouterApi
from kedit_daemon.serve.supervisor import read_token
from kedit_daemon.system.log_setup import configure_logging
from memory.errors import KeditError

STREAM_SECONDS = 4.0  # from the stop until running answers are broken off
CANCEL_SECONDS = 6.0  # from the stop until running requests are cancelled
OOM_SCORE = 500  # half of the highest
log = logging.getLogger(__name__)


def main() -> None:
    """Serve by the settings on stdin until SIGTERM, or until stdin closes."""
    settings = json.loads(sys.stdin.buffer.readline())
    home = Home(Path(settings["home"]), settings["cache"] and Path(settings["cache"]))
    config = Config.model_validate(settings["config"])
    configure_logging(settings["debug"], os.environ)
    _raise_oom_score()
    threading.Thread(target=_exit_with_daemon, name="lifeline", daemon=True).start()
    try:
        asyncio.run(_run_server(home, config))
    except KeditError as error:
        log.error("The HTTP server cannot run: %s", error)
        sys.exit(error.exit_code)


def _raise_oom_score() -> None:
    """Make the kernel kill this process first if memory runs out: the daemon may be writing."""
    score = Path("/proc/self/oom_score_adj")
    with suppress(OSError):  # no Linux, or no permission
        if int(score.read_text()) < OOM_SCORE:
            score.write_text(str(OOM_SCORE))


def _exit_with_daemon() -> None:
    # Not by sys.stdin: a thread that waits in its lock would abort the exit of the process.
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(CANCEL_SECONDS + 2)
    os._exit(1)  # the process hangs, and nobody is left to kill it


async def _run_server(home: Home, config: Config) -> None:
    token = read_token(home, config)
    app = build_app(home, config, token, lambda: datetime.now(UTC), time.monotonic)
    server = HttpServer(app, home, config)
    await server.serve()
    if server.failure is not None:
        raise server.failure


def _load_reader(home: Home, config: Config) -> Reader:
    # Torch takes seconds to import: in a thread, so that requests are answered meanwhile.
    from kedit_daemon.serve.inference.open_model import open_reader

    return open_reader(home, config)


def _load_facts(router: RouterApi, home: Home, config: Config) -> None:
    from kedit_daemon.serve.router.load_router import load_router

    load_router(router, home, config, time.time())


class HttpServer(uvicorn.Server):
    """A server that listens first, then loads the model, or the facts of a router, and ends if that
    fails."""

    def __init__(self, app: Starlette, home: Home, settings: Config) -> None:
        self.failure: BaseException | None = None
        self._app, self._home, self._settings = app, home, settings
        super().__init__(
            uvicorn.Config(
                app,
                host=settings.serve.host,
                port=settings.serve.port,
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=int(CANCEL_SECONDS),
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, and begin to load."""
        await super().startup(sockets)
        log.info("Listening on http://%s:%d", self.config.host, self.config.port)
        self._load_task = asyncio.create_task(self._load_model())
        self._load_task.add_done_callback(self._check_load_task)

    async def _load_model(self) -> None:
        if (router := self._app.state.router) is not None:
            await asyncio.to_thread(_load_facts, router, self._home, self._settings)
            log.info("Routing to %s", ", ".join(self._settings.serve.engine))
            return
        reader = await asyncio.to_thread(_load_reader, self._home, self._settings)
        attach_reader(self._app, reader)
        log.info("Answering as %s", reader.name)

    def _check_load_task(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failure, self.should_exit = error, True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait until running answers end; break off those that take too long."""
        ending = asyncio.create_task(self._close_engine(STREAM_SECONDS))
        await super().shutdown(sockets)
        ending.cancel()
        await self._close_engine(0)
        if self._app.state.router is not None:
            await self._app.state.router.close()

    async def _close_engine(self, after: float) -> None:
        await asyncio.sleep(after)
        if self._app.state.reader is not None:
            await asyncio.to_thread(self._app.state.reader.engine.close)


if __name__ == "__main__":
    main()
