"""One daemon a home; told to end, it ends whole; a hang is noticed; `status` tells the truth.

The daemons are forks of this process: they are killed, stopped and told to end as any other.
"""

import json
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import forking
import pytest
from command_line import called
from editing_home import Bench
from forking import copied, ended, up
from process_tools import FACTS, at_rest, drop, make_home, outcome, query, starts, wait
from promise_table import Tally
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import PreTrainedModel

from kedit_daemon.control import send_request
from kedit_daemon.daemon.loop import Daemon
from kedit_daemon.editing.editor import Editor
from kedit_daemon.editing.tensor_files import load_deltas
from kedit_daemon.home import Home
from kedit_daemon.system.sd_notify import SystemdNotifier
from memory.db.event_log import read_head, verify_chain
from memory.db.queries import open_readonly
from memory.db.store import Store
from memory.facts import FactState

pytestmark = [
    pytest.mark.timeout(280),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


@dataclass(frozen=True)
class Calm:
    """A home that a daemon has prepared, with facts dropped since; how it ends in peace, and how
    many seconds that takes."""

    home: Home
    end: tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]
    seconds: float


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, model_folder: Callable[[str], Path]) -> Home:
    """A home whose daemon was up once, so that it knows the model."""
    home = make_home(tmp_path_factory.mktemp("process") / "home", model_folder("llama"))
    stop(up(home))
    return home


@pytest.fixture(scope="module")
def calm(prepared: Home, tmp_path_factory: pytest.TempPathFactory) -> Calm:
    folder = tmp_path_factory.mktemp("calm")
    home, work = copied(prepared, folder / "home"), copied(prepared, folder / "work")
    drop(home)
    drop(work)
    began = time.monotonic()
    finish(work)
    return Calm(home, outcome(work), time.monotonic() - began)


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGTERM)
    assert ended(pid) == 0


def finish(home: Home) -> None:
    """Let a daemon do all that is left to do."""
    pid = up(home)
    wait(lambda: at_rest(home), home)
    stop(pid)


def whole(home: Home) -> bool:
    """Whether nothing is half done: the history, and the weights that are to be served."""
    with closing(open_readonly(home.database_file)) as conn:
        intact = verify_chain(conn, read_head(home.head_file)).intact
    with closing(Store(home.database_file, lambda: pytest.fail("nothing is written"))) as store:
        row = store.artifacts.get_generation(store.artifacts.active_generation())
        load_deltas(home.generations_folder, row)  # raises where the file is not what the row says
        live = {f.id for f in store.list_facts((FactState.LIVE_WEIGHTS,))}
    return intact and live == set(row.fact_ids) and not home.socket_file.exists()


# To end it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("burst", [1, 30], ids=["SIGTERM", "SIGTERM-and-SIGINT-again-and-again"])
def test_told_to_end_at_any_moment_it_ends_whole(
    burst: int, calm: Calm, tmp_path: Path, tally: Tally, request: pytest.FixtureRequest
) -> None:
    moments = random.Random(burst)
    for number in range(8 if request.config.getoption("--whole") else 1):
        home = copied(calm.home, tmp_path / f"home{number}")
        for begun in (False, False, True):
            before = starts(home)
            pid = forking.daemon(home)
            # However slow the machine is, one of the moments lies behind the start.
            wait(home.socket_file.exists if begun else home.lock_file.exists, home)
            time.sleep(moments.uniform(0.1, calm.seconds / 2))
            for turn in range(burst):
                os.kill(pid, (signal.SIGTERM, signal.SIGINT)[turn % 2])
                time.sleep(0.001 * (burst > 1))
            code = ended(pid)
            early = code == -signal.SIGTERM and starts(home) == before  # it had not begun
            well = (code == 0 or early) and whole(home)
            tally.tried(bad=not well)
            assert well, (code, (home.root / "daemon.log").read_text()[-2000:])
        finish(home)
        same = outcome(home) == calm.end
        tally.tried(bad=not same)
        assert same


def interrupted_everywhere(at: Bench) -> int:
    """Wait for requests, told to stop at the first line of it, the second, and so on, also where
    the line is one of the library's; how many lines there were."""
    line = 0
    while True:
        line += 1
        made = Daemon(at.home, at.config, at.store, SystemdNotifier({}), at.clock, lambda: 1000.0)
        seen = 0

        def trace(
            frame: FrameType, event: str, _: object, at: int = line, made: Daemon = made
        ) -> Any:
            nonlocal seen
            if event == "line":
                seen += 1
                if seen == at:
                    made._request_stop()
            return trace

        sys.settrace(trace)
        made._wait_for_requests(0.01)
        made.stop_flag.is_set()
        sys.settrace(None)
        if seen < line:
            return line - 1


def test_a_signal_may_come_between_any_two_lines(
    bench: Callable[..., Bench], tmp_path: Path, tally: Tally
) -> None:
    at = bench()

    def work() -> int:
        signal.alarm(8)  # it hangs, if a lock is held that its handler wants
        return interrupted_everywhere(at)

    lines = ended(forking.forked(work, tmp_path / "log"))
    tally.tried(max(lines, 1), bad=lines <= 0)
    assert 4 <= lines < forking.BROKEN, (tmp_path / "log").read_text()


# Who runs, and what is said of it -----------------------------------------------------------------


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind(str(tmp_path / "notify"))
        inbox.settimeout(30)
        yield inbox


def told(supervisor: socket.socket, seconds: float) -> list[str]:
    """What comes within a time, and what has come before."""
    deadline, found = time.monotonic() + seconds, list[str]()
    while (left := deadline - time.monotonic()) > 0:
        supervisor.settimeout(left)
        try:
            found.append(supervisor.recv(4096).decode())
        except (TimeoutError, BlockingIOError):
            break
    return found


def status(home: Home) -> tuple[int, dict[str, Any]]:
    result = called(home, "status", "--json")
    return result.exit_code, json.loads(result.stdout)


def test_one_daemon_at_a_time_and_the_truth_of_it(
    prepared: Home, tmp_path: Path, supervisor: socket.socket, tally: Tally
) -> None:
    home = copied(prepared, tmp_path / "home")
    environ = {"NOTIFY_SOCKET": supervisor.getsockname(), "WATCHDOG_USEC": "3000000"}
    first = up(home, environ)
    try:
        assert supervisor.recv(4096) == b"READY=1"  # before anything else, and once
        code, now = status(home)
        assert (code, now["state"], now["pid"]) == (0, "running", first)
        second = forking.daemon(home)
        assert ended(second) == 75
        assert f"another daemon, pid {first}," in (home.root / "daemon.log").read_text()

        os.kill(first, signal.SIGSTOP)
        told(supervisor, 0.3)
        drop(home)
        assert told(supervisor, 2.0) == []
        assert status(home)[1]["pid"] == first  # it stands still, and nobody else may begin
        assert ended(forking.daemon(home)) == 75
        os.kill(first, signal.SIGCONT)
        wait(lambda: at_rest(home), home)
        assert not query(home, "SELECT 1 FROM events WHERE kind = 'clock_jump'")
        assert set(told(supervisor, 0.5)) == {"WATCHDOG=1"}
    finally:
        os.kill(first, signal.SIGKILL)
    assert ended(first) == -signal.SIGKILL
    code, now = status(home)
    assert (code, now["state"], now["pid"], now["since"]) == (3, "stopped", None, None)
    assert now["facts"]["received"] == 0 and sum(now["facts"].values()) == len(FACTS)

    third = up(home, environ)
    assert status(home)[1]["pid"] == third
    stop(third)
    said = [word for word in told(supervisor, 0.2) if word != "WATCHDOG=1"]
    assert said == ["READY=1", "STOPPING=1"]
    assert status(home)[0] == 3
    tally.tried(6, kills=1)


def test_the_watchdog_hears_of_progress_alone(
    prepared: Home, tmp_path: Path, supervisor: socket.socket
) -> None:
    home = copied(prepared, tmp_path / "home")
    stuck = tmp_path / "stuck"

    def hang(_: Editor) -> bool:
        while stuck.exists():
            time.sleep(0.05)
        return False

    def twist() -> None:
        Editor.step = hang  # type: ignore[method-assign]

    pid = forking.daemon(home, {"NOTIFY_SOCKET": supervisor.getsockname()}, twist)
    try:
        assert supervisor.recv(4096) == b"READY=1"
        assert told(supervisor, 2.5).count("WATCHDOG=1") >= 2
        stuck.touch()
        told(supervisor, 1.5)
        assert told(supervisor, 2.5) == []
        stuck.unlink()
        assert told(supervisor, 2.5).count("WATCHDOG=1") >= 2
        stop(pid)
    finally:
        forking.kill(pid)


@pytest.mark.whole
def test_the_watchdog_hears_of_long_work(
    prepared: Home, tmp_path: Path, supervisor: socket.socket
) -> None:
    home = copied(prepared, tmp_path / "home")

    def slow(module: object, _: object) -> None:
        if isinstance(module, PreTrainedModel) and home.socket_file.exists():
            time.sleep(0.02)

    pid = forking.daemon(
        home,
        {"NOTIFY_SOCKET": supervisor.getsockname()},
        lambda: register_module_forward_pre_hook(slow),
    )
    try:
        assert supervisor.recv(4096) == b"READY=1"
        send_request(
            home.socket_file, "audit", {"dry_run": True}
        )  # what is due at the start is over then
        told(supervisor, 0.01)
        began = time.monotonic()
        send_request(home.socket_file, "audit", {"dry_run": True})
        took = time.monotonic() - began
        assert took > 1.5
        assert told(supervisor, 0.01).count("WATCHDOG=1") >= min(int(took / 1.6), 8)
        stop(pid)
    finally:
        forking.kill(pid)
