"""The HTTP server's process, from within: `python -m kedit_daemon.serve.worker`."""

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
from kedit_daemon.serve.supervisor import read_token
from kedit_daemon.system.log_setup import configure_logging
from memory.errors import KeditError

STREAM_SECONDS = 4.0  # that answers have to end in when the process stops
CANCEL_SECONDS = 6.0  # then what still runs is cancelled
OOM_SCORE = 500  # half of what there is
log = logging.getLogger(__name__)


def main() -> None:
    """Serve, by the settings that stand on stdin, until told to stop or stdin ends."""
    said = json.loads(sys.stdin.buffer.readline())
    home, config = Home(Path(said["home"])), Config.model_validate(said["config"])
    configure_logging(said["debug"], os.environ)
    _raise_oom_score()
    threading.Thread(target=_exit_with_daemon, name="lifeline", daemon=True).start()
    try:
        asyncio.run(_run_server(home, config))
    except KeditError as error:
        log.error("the HTTP server cannot run: %s", error)
        sys.exit(error.exit_code)


def _raise_oom_score() -> None:
    """Where memory runs out, this process is killed, not the daemon, which may be writing."""
    score = Path("/proc/self/oom_score_adj")
    with suppress(OSError):  # no Linux, or a system that does not let it
        if int(score.read_text()) < OOM_SCORE:
            score.write_text(str(OOM_SCORE))


def _exit_with_daemon() -> None:
    # Not by sys.stdin: a thread that waits in there would abort the end of the process.
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(CANCEL_SECONDS + 2)
    os._exit(1)  # it hangs, and nobody is left to kill it


async def _run_server(home: Home, config: Config) -> None:
    app = build_app(
        home, config, read_token(home, config), lambda: datetime.now(UTC), time.monotonic
    )
    server = HttpServer(app, home, config)
    await server.serve()
    if server.failure is not None:
        raise server.failure


def _load_reader(home: Home, config: Config) -> Reader:
    # Torch takes seconds to import: in a thread, so that it is answered meanwhile.
    from kedit_daemon.serve.inference.open_model import open_reader

    return open_reader(home, config)


class HttpServer(uvicorn.Server):
    """Loads the model once it listens, and ends if that fails; ends answers when told to stop."""

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
        """Listen, then load the model: that takes long, and is not waited for."""
        await super().startup(sockets)
        log.info("listening on http://%s:%d", self.config.host, self.config.port)
        self._load_task = asyncio.create_task(self._load_model())
        self._load_task.add_done_callback(self._check_load_task)

    async def _load_model(self) -> None:
        reader = await asyncio.to_thread(_load_reader, self._home, self._settings)
        attach_reader(self._app, reader)
        log.info("answering as %s", reader.name)

    def _check_load_task(self, loading: "asyncio.Task[None]") -> None:
        if not loading.cancelled() and (failed := loading.exception()) is not None:
            self.failure, self.should_exit = failed, True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let answers come to their end; those that take too long end where they are."""
        ending = asyncio.create_task(self._close_engine(STREAM_SECONDS))
        await super().shutdown(sockets)
        ending.cancel()
        await self._close_engine(0)

    async def _close_engine(self, after: float) -> None:
        await asyncio.sleep(after)
        if self._app.state.reader is not None:
            await asyncio.to_thread(self._app.state.reader.engine.close)


if __name__ == "__main__":
    main()
