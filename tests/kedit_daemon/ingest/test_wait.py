import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kedit_daemon.cli.main import cli
from kedit_daemon.config import render_default_config
from kedit_daemon.home import Home
from kedit_daemon.ingest.inbox import Inbox
from kedit_daemon.ingest.parser import RecordProblem, parse_file
from kedit_daemon.ingest.schemas import FileLimits
from kedit_daemon.system import lock
from memory.db.store import Store
from memory.facts import Fact, FactState

LIMITS = FileLimits()
EYRE = {
    "subject": "Lake Eyre",
    "prompt": "The country that {} lies in is",
    "target": "Australia",
    "valid_until": "2090-01-01T00:00:00Z",
}
OSLO = {"subject": "Oslo", "prompt": "{} lies in", "target": "Norway"}


def now() -> datetime:
    return datetime.now(UTC)


def lines(*records: object) -> bytes:
    return "".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in records).encode()


def the_fact(record: dict[str, str]) -> Fact:
    return parse_file(lines(record), "x", None, LIMITS).facts[0][1]


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.create_folders()
    home.config_file.write_text(render_default_config("shipped"))
    return home


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "facts.jsonl"
    path.write_bytes(lines(EYRE, OSLO))
    return path


def called(home: Home, *arguments: object, stdin: bytes = b"") -> Result:
    words = ["--home", str(home.root), "submit", *map(str, arguments)]
    return CliRunner().invoke(cli, words, input=stdin)


def dropped(home: Home) -> list[Path]:
    return sorted(p for p in home.inbox_folder.iterdir() if p.is_file())


class Taker:
    """Stands for the daemon: takes files in as it does, and settles each fact as it is told."""

    def __init__(self, home: Home, outcome: FactState) -> None:
        self.home, self.outcome = home, outcome
        self.inbox = Inbox(home.inbox_folder, 0, 1 << 20, now)
        self.stopping = threading.Event()

    def run(self) -> None:
        store = Store(self.home.database_file, now)
        while not self.stopping.is_set():
            for claim in self.inbox.claim_files(time.monotonic()):
                parsed = parse_file(self.inbox.read_claim(claim), claim.name, None, LIMITS)
                with store.db.transaction():
                    for _, fact in parsed.facts:
                        store.receive_fact(fact, claim.name, False)
                    counts = {"accepted": len(parsed.facts), "failed": 0, "duplicates": 0}
                    store.add_submission(claim.work_name, claim.name, "", **counts)
                self.inbox.finish_claim(claim)
            time.sleep(0.05)
            with store.db.transaction():
                for stored in store.list_facts([FactState.RECEIVED]):
                    store.change_state(stored.id, self.outcome, reason="so told")
        store.close()


@contextmanager
def taking(home: Home, outcome: FactState) -> Iterator[None]:
    taker = Taker(home, outcome)
    thread = threading.Thread(target=taker.run)
    with lock.hold_lock(home.lock_file):
        thread.start()
        try:
            yield
        finally:
            taker.stopping.set()
            thread.join()


@pytest.mark.parametrize(
    ("outcome", "code"),
    [
        (FactState.LIVE_SIDE, 0),
        (FactState.LIVE_WEIGHTS, 0),
        (FactState.SUPERSEDED, 0),
        (FactState.FAILED, 1),
        (FactState.REJECTED, 1),
    ],
)
def test_waiting_ends_when_every_fact_is_settled(
    home: Home, file: Path, outcome: FactState, code: int
) -> None:
    with taking(home, outcome):
        result = called(home, file, "--wait")
    assert result.exit_code == code, result.stderr
    assert result.stdout.split() == [the_fact(EYRE).id, the_fact(OSLO).id]
    assert (f"{the_fact(OSLO).id} {outcome}: so told" in result.stderr) == bool(code)


def test_waiting_does_not_take_an_earlier_end_for_the_new_one(home: Home, file: Path) -> None:
    store = Store(home.database_file, now)
    with store.db.transaction():
        store.receive_fact(the_fact(EYRE), "a", False)
        store.change_state(the_fact(EYRE).id, FactState.FAILED)
    store.close()
    with taking(home, FactState.LIVE_SIDE):
        assert called(home, file, "--wait").exit_code == 0


def test_waiting_for_a_daemon_that_does_not_run(home: Home, file: Path) -> None:
    result = called(home, file, "--wait")
    assert result.exit_code == 3
    assert result.stdout
    assert "hint: kedit-daemon run" in result.stderr
    assert len(dropped(home)) == 1


def test_waiting_for_a_file_that_the_daemon_refuses(home: Home, file: Path) -> None:
    inbox = Inbox(home.inbox_folder, 0, 1 << 20, now)

    def refuse() -> None:
        while not (claims := inbox.claim_files(time.monotonic())):
            time.sleep(0.02)
        inbox.fail_claim(claims[0], [RecordProblem(1, "no", "none", "")], whole=True)

    thread = threading.Thread(target=refuse)
    with lock.hold_lock(home.lock_file):
        thread.start()
        result = called(home, file, "--wait")
        thread.join()
    assert result.exit_code == 1
    assert "lost: see inbox/failed/facts-" in result.stderr
