"""A daemon process with its server, started again when it is killed, and measured while it runs."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from command_line import ROOT

from kedit_daemon.control import send_request
from kedit_daemon.home import Home
from memory.db import queries
from memory.errors import KeditError

CONFIG = """\
model = "{model}"
device = "cpu"
[inbox]
settle_seconds = 0.0
rescan_seconds = 1.0
[routing]
direct_facts = 8
flush_facts = 20
[stability]
agreement_warn = 0.25
agreement_consolidate = 0.35
agreement_revert = 0.5
[serve]
port = {port}
"""
START_SECONDS = 180.0
EVERY = 5.0  # seconds between two samples
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Sample:
    """What a process held at a moment: seconds since the start of all, and since all was ready."""

    at: float
    pid: int
    age: float
    who: str
    rss: int
    fds: int


class Daemon:
    """One home, and the processes that serve it, one after the other."""

    def __init__(self, root: Path, model: str, port: int) -> None:
        self.home, self.port = Home(root), port
        self.url = f"http://127.0.0.1:{port}"
        self.home.create_folders()
        self.home.config_file.write_text(CONFIG.format(model=model, port=port), encoding="utf-8")
        self.began = time.monotonic()
        self.ready_at, self.samples = float("inf"), list[Sample]()
        self.outages: list[tuple[float, float]] = []  # from a kill until answers come again
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)

    def start(self) -> None:
        command = [sys.executable, "-m", "kedit_daemon", "--home", str(self.home.root), "run"]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environ = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
        with (self.home.root / "daemon.log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environ, cwd=ROOT)
        if not self._sampler.ident:
            self._sampler.start()

    def wait_ready(self) -> None:
        """Until the daemon takes orders and the server answers."""
        deadline = time.monotonic() + START_SECONDS
        while not self._ready():
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise SystemExit((self.home.root / "daemon.log").read_text()[-3000:])
            time.sleep(0.1)
        self.ready_at = time.monotonic()

    def _ready(self) -> bool:
        with suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/ready", timeout=5).is_success
        return False

    def kill(self, server: bool = False) -> None:
        """kill -9, and what a supervisor does then; the daemon itself looks after its server."""
        at, self.ready_at = time.monotonic(), float("inf")
        if server:
            os.kill(self.child() or 0, signal.SIGKILL)
        else:
            self.process.kill()
            self.process.wait(60)
            self.start()
        time.sleep(0.5)  # until the old server has noticed
        self.wait_ready()
        self.outages.append((at, time.monotonic()))

    def child(self) -> int | None:
        """The server's process."""
        with suppress(OSError):
            for task in Path(f"/proc/{self.process.pid}/task").iterdir():
                for pid in (task / "children").read_text().split():
                    return int(pid)
        return None

    def call(self, name: str, **given: Any) -> dict[str, Any]:
        return send_request(self.home.socket_file, name, given, timeout=300)

    def rows(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        try:
            connection = queries.open_readonly(self.home.database_file)
        except KeditError:
            return []
        try:
            return [tuple(row) for row in connection.execute(sql, values)]
        finally:
            connection.close()

    def end(self) -> int:
        self._stop.set()
        self._sampler.join()
        self.process.terminate()
        return self.process.wait(60)

    def _sample(self) -> None:
        while not self._stop.wait(EVERY):
            for who, pid in (("daemon", self.process.pid), ("server", self.child())):
                with suppress(OSError, ValueError):
                    now = time.monotonic()
                    rss = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
                    fds = len(os.listdir(f"/proc/{pid}/fd"))
                    age = now - self.ready_at
                    self.samples.append(Sample(now - self.began, pid or 0, age, who, rss, fds))
