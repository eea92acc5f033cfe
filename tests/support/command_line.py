"""What the tests of the command line share: a home with a history, and ways to call commands."""

import json
import os
import pty
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from paths import ROOT

from kedit_daemon.cli.main import cli
from kedit_daemon.control import ControlRequest, ControlServer
from kedit_daemon.home import Home
from kedit_daemon.system import lock
from memory.db.event_log import write_head
from memory.db.store import Store
from memory.errors import KeditError
from memory.facts import Fact, FactState

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
EYRE = Fact("Lake Eyre", "The country that {} lies in is", "Australia", external_id="mine")
OSLO = Fact("Oslo", "{} lies in", "Norway")
EVIL = Fact("\x1b[2JOslo", "{} \u202e is", "\x07\n")


def make_home(root: Path) -> Home:
    """A home with a fact in each tier, one of hostile text, an audit and a kept head."""
    home = Home(root)
    home.create_folders()
    home.config_file.write_text("")
    store = Store(home.database_file, lambda: NOW)
    with store.db.transaction():
        for fact in (EYRE, OSLO, EVIL):
            store.receive_fact(fact, "facts.jsonl", False)
        store.change_state(
            EYRE.id, FactState.LIVE_SIDE, tier="side", before="Egypt", after="Australia"
        )
        store.add_edit(EYRE.id, "side", None, 1.5, "ok", {"answers": True})
        store.change_state(OSLO.id, FactState.LIVE_WEIGHTS, tier="weights", generation=1)
        store.add_audit(0, "keep", {"norm_ratio": {"4": 1.01}}, [], 0.5)
        write_head(home.head_file, store.db.write_event("stopped"))
    store.close()
    return home


def called(home: Home | None, *words: str, **changed: Any) -> Result:
    options = [] if home is None else ["--home", str(home.root)]
    return CliRunner().invoke(cli, [*options, *words], **changed)


def read(result: Result) -> Any:
    return json.loads(result.stdout)


@dataclass
class Daemon:
    """Stands for the running daemon: notes what it is asked, and says what it was told to."""

    replies: Mapping[str, dict[str, Any] | KeditError]
    asked: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def serve(self, server: ControlServer, stopping: threading.Event) -> None:
        while not stopping.is_set():
            if server.requests.empty():
                time.sleep(0.005)
                continue
            request: ControlRequest = server.requests.get()
            self.asked.append((request.name, request.arguments))
            reply = self.replies[request.name]
            if isinstance(reply, KeditError):
                request.send_refusal(reply)
            else:
                request.send_answer(reply)


@contextmanager
def daemon(home: Home, **replies: dict[str, Any] | KeditError) -> Iterator[Daemon]:
    server, stopping, running = ControlServer(home.socket_file), threading.Event(), Daemon(replies)
    thread = threading.Thread(target=running.serve, args=(server, stopping))
    with lock.hold_lock(home.lock_file):
        server.start()
        thread.start()
        try:
            yield running
        finally:
            stopping.set()
            thread.join()
            server.stop()


def process(home: Home, *words: str, **changed: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "kedit_daemon", "--home", str(home.root), *words]
    return subprocess.Popen(command, cwd=ROOT, **changed)


def on_terminal(home: Home, *words: str, typed: str = "", **environ: str) -> tuple[int, str]:
    """The exit code and all that a terminal shows."""
    ours, theirs = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"} | environ
    child = process(home, *words, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    os.write(ours, typed.encode())
    seen = b""
    try:
        while piece := os.read(ours, 4096):
            seen += piece
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    return child.wait(60), seen.decode()
