"""Supervision of the HTTP server's process, which answers clients while facts are learned.

The daemon starts it, restarts it when it ends, and goes on without it. The child reads its settings
from stdin, in one line; when stdin closes, the daemon has ended, and the child ends too. Imports
nothing heavy: the daemon imports it whether there is a server or not.
"""

import json
import logging
import os
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile

from kedit_daemon.config import Config
from kedit_daemon.home import Home
from kedit_daemon.system.backoff import Backoff
from memory.errors import KeditError

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds before a restart
STEADY_SECONDS = 600.0  # a child that lived this long had started well, however long it loaded
STOP_SECONDS = 10.0  # from SIGTERM to SIGKILL
MIN_TOKEN_CHARS = 16
EXTRA = ("jinja2", "prometheus_client", "starlette", "uvicorn")
log = logging.getLogger(__name__)


def check_settings(home: Home, config: Config) -> None:
    """Refuse settings with which no server could run (KeditError with exit code 78)."""
    if not config.serve.port:
        return
    if missing := [name for name in EXTRA if find_spec(name) is None]:
        raise KeditError(
            f"[serve] port is set, and {missing[0]} is not installed",
            code="bad-config",
            hint="pip install 'kedit-daemon[serve]', or set port = 0",
        )
    read_token(home, config)
    if config.serve.adapters is not None:
        _check_adapters(Path(config.serve.adapters).expanduser())


def _check_adapters(folder: Path) -> None:
    """Refuse a folder of adapters that cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise KeditError(
            f"[serve] adapters: {folder}: {error.strerror or error}",
            code="bad-config",
            hint="name a folder that the daemon may write to, and the engines read",
        ) from error


def read_token(home: Home, config: Config) -> str | None:
    """Read the clients' token; None if there is no token file.

    Raises KeditError (78): others may read the file, or it holds no token.
    """
    if config.serve.token_file is None:
        return None
    path = home.root / Path(config.serve.token_file).expanduser()
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            token = file.read(4096).decode("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = f": {error.strerror}" if isinstance(error, OSError) else " is not plain ASCII"
        raise _token_error(f"{path}{why}", "put a long random word into it") from error
    if mode & (stat.S_IROTH | stat.S_IWOTH):
        raise _token_error(f"everybody may read {path}", f"chmod o-rwx {path}")
    if len(token) < MIN_TOKEN_CHARS or len(token.split()) != 1:
        message = f"{path} must hold one word of {MIN_TOKEN_CHARS} characters at least"
        raise _token_error(message, f"openssl rand -hex 32 > {path}")
    return token


def _token_error(message: str, hint: str) -> KeditError:
    return KeditError(f"token_file: {message}", code="bad-config", hint=hint)


@contextmanager
def keep_serving(home: Home, config: Config) -> Iterator[None]:
    """Run a server during the block, if the settings ask for one."""
    if not config.serve.port:
        yield
        return
    debug = logging.getLogger().isEnabledFor(logging.DEBUG)
    cache = None if home.shared_cache is None else str(home.shared_cache)
    folders = {"home": str(home.root), "cache": cache}
    settings = folders | {"config": config.model_dump(), "debug": debug}
    command = [sys.executable, "-P", "-m", "kedit_daemon.serve.worker"]
    keeper = ProcessKeeper(command, json.dumps(settings).encode() + b"\n")
    keeper.start()
    try:
        yield
    finally:
        keeper.stop()


class ProcessKeeper:
    """Runs a command until stopped, and restarts it with a growing pause while it ends soon."""

    def __init__(
        self, command: Sequence[str], stdin_data: bytes, pause: float = FIRST_PAUSE
    ) -> None:
        """`stdin_data` is written to the child's stdin; `pause` is the first pause, in seconds."""
        self._command, self._stdin_data, self._first_pause = list(command), stdin_data, pause
        self._stop_event = threading.Event()
        self._start_lock = threading.Lock()  # no start between a stop and its SIGTERM
        self._child: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep_running, name="serve", daemon=True)

    @property
    def pid(self) -> int | None:
        """The child's process id, if there is a child."""
        return self._child.pid if self._child is not None else None

    def start(self) -> None:
        """Start the thread that runs the command."""
        self._thread.start()

    def stop(self) -> None:
        """Terminate the child; kill it if it does not end in time."""
        with self._start_lock:
            self._stop_event.set()
            child = self._child
        if child is not None:
            child.terminate()
            try:
                child.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                log.warning("The HTTP server does not end: killing it")
                child.kill()
        self._thread.join()

    def _keep_running(self) -> None:
        backoff = Backoff(self._first_pause, LONGEST_PAUSE, time.monotonic)
        while True:
            started_at = time.monotonic()
            outcome = self._run_child()
            if self._stop_event.is_set():
                return
            if time.monotonic() - started_at >= STEADY_SECONDS:
                backoff.reset()
            pause = backoff.record_failure()
            log.warning("The HTTP server %s; it starts again in %g s", outcome, pause)
            if self._stop_event.wait(pause):
                return

    def _run_child(self) -> str:
        """Run the child once; return how it ended."""
        # The child imports the modules from where this process has them.
        environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p or "." for p in sys.path)}
        environ.pop("NOTIFY_SOCKET", None)  # only the daemon reports its state to systemd
        try:
            with self._start_lock:
                if self._stop_event.is_set():
                    return "was not started"
                # A session of its own: Ctrl-C goes to the daemon, which ends the child.
                self._child = subprocess.Popen(
                    self._command,
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    env=environ,
                    start_new_session=True,
                )
        except OSError as error:
            return f"could not be started: {error}"
        with self._child:
            assert self._child.stdin is not None
            with suppress(BrokenPipeError):
                self._child.stdin.write(self._stdin_data)
            return f"ended with {self._child.wait()}"
