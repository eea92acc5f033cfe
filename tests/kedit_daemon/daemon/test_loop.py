"""The process, as seen from outside: it takes work, answers, and stops politely."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from editing_home import LOOSE, Bench, Clock, seat
from side_tools import fact_numbers
from tiny_models import CITIES

from kedit_daemon import control
from kedit_daemon.control import ControlRequest
from kedit_daemon.daemon.job_runner import run_job
from kedit_daemon.daemon.loop import WAKE_REQUEST, Daemon
from kedit_daemon.editing.editor import Editor
from kedit_daemon.editing.live_model import LiveModel
from kedit_daemon.home import Home
from kedit_daemon.system.sd_notify import SystemdNotifier
from memory.db import queries
from memory.db.event_log import read_head, verify_chain
from memory.db.overview import fetch_overview
from memory.db.store import JOB_OK
from memory.errors import KeditError
from memory.facts import FactState
from memory.side.index import KeyIndex, to_fact_number

pytestmark = pytest.mark.timeout(120)


def make_home(root: Path, model: Path) -> Home:
    home = Home(root)
    home.create_folders()
    limits = "\n".join(f"{name} = {value}" for name, value in LOOSE["stability"].items())
    home.config_file.write_text(
        f'model = {json.dumps(str(model))}\ndevice = "cpu"\n[inbox]\nsettle_seconds = 0.0\n'
        f"rescan_seconds = 0.2\n[side]\nsteps = 300\n[stability]\n{limits}\n",
        encoding="utf-8",
    )
    return home


def start(home: Home) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "kedit_daemon", "--home", str(home.root), "run"]
    with (home.root / "daemon.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environ())


def environ() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def wait(what: Callable[[], bool], home: Home) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline, (home.root / "daemon.log").read_text()[-2000:]
        time.sleep(0.05)


def states(home: Home) -> dict[str, int]:
    connection = queries.open_readonly(home.database_file)
    try:
        return dict(fetch_overview(connection)["states"])
    finally:
        connection.close()


@pytest.fixture(scope="module")
def home(
    model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Home]:
    """The home of a daemon that runs while this file is tested."""
    made = make_home(tmp_path_factory.mktemp("daemon") / "home", model_folder("llama"))
    process = start(made)
    try:
        wait(made.socket_file.exists, made)
        yield made
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        stopped_well(made)
    finally:
        process.kill()
        process.wait(60)


def stopped_well(home: Home) -> None:
    connection = queries.open_readonly(home.database_file)
    try:
        found = verify_chain(connection, read_head(home.head_file))
        last = connection.execute("SELECT kind FROM events ORDER BY seq DESC LIMIT 1").fetchone()
    finally:
        connection.close()
    assert found.intact, found.problem
    assert found.head_seq == (read_head(home.head_file) or (0, ""))[0]
    assert last[0] == "daemon_stopped"
    assert not home.socket_file.exists()


def index_file(home: Home) -> str:
    connection = queries.open_readonly(home.database_file)
    try:
        query = "SELECT value FROM meta WHERE key = 'index_sha256'"
        return str(connection.execute(query).fetchone()[0])
    finally:
        connection.close()


def test_the_index_is_written_when_the_daemon_stops(
    tmp_path: Path,
    model_folder: Callable[[str], Path],
    bench: Callable[..., Bench],
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock.now = datetime.now(UTC)  # facts that look old to the daemon would be flushed
    home = make_home(tmp_path / "home", model_folder("llama"))
    facts = [seat(n, CITIES[n]) for n in range(6)]
    at = bench(side={"steps": 300})
    at.receive(facts[0])
    at.settle()
    (row,) = at.store.artifacts.read_side_keys()
    at.receive(*facts[1:])
    with at.store.db.transaction():
        for fact in facts[1:]:
            at.store.artifacts.put_side_keys(fact.id, row.shard, row.blob)
            at.store.change_state(fact.id, FactState.LIVE_SIDE, tier="side")
        for job in ("audit", "retention"):  # these would learn anew what is not stated
            monkeypatch.setenv(f"KEDIT_SCHEDULE_{job.upper()}", "0 0 29 2 *")
            at.store.finish_job(at.store.start_job(job, at.store.db.format_now()), JOB_OK)
    process = start(home)
    try:
        wait(home.socket_file.exists, home)
        before = index_file(home)
        control.send_request(home.socket_file, "revert", {"facts": [facts[1].id]})
        assert index_file(home) == before  # one of six is not worth it
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        written = KeyIndex.load(home.index_folder, index_file(home))
        assert set(fact_numbers(written)) == {
            to_fact_number(f.id) for f in facts if f is not facts[1]
        }
    finally:
        process.kill()
        process.wait(60)


def test_a_dropped_file_is_answered_with(home: Home) -> None:
    fact = seat(1, "Oslo")
    record = {"subject": fact.subject, "prompt": fact.prompt, "target": fact.target}
    (home.inbox_folder / "one.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    wait(lambda: states(home).get("live-side", 0) == 1, home)
    told = control.send_request(
        home.socket_file, "ask", {"prompt": fact.question, "max_tokens": 12}
    )
    assert (told["answer"], told["generation"]) == ("Oslo", 0)
    assert [path.name for path in (home.inbox_folder / "done").iterdir()] == ["one.jsonl"]


def test_what_commands_ask_for_is_done(home: Home) -> None:
    wait(lambda: states(home).get("live-side", 0) == 1, home)
    assert control.send_request(home.socket_file, "flush", {"dry_run": True})["dry_run"]
    assert len(control.send_request(home.socket_file, "flush", {})["flushed"]) == 1
    assert control.send_request(home.socket_file, "audit", {})["figures"]["retention"] == 1.0
    assert not control.send_request(home.socket_file, "consolidate", {})["changed"]
    assert (
        control.send_request(home.socket_file, "revert", {"facts": [seat(1, "Oslo").id]})[
            "generation"
        ]
        == 2
    )


def test_requests_that_make_no_sense_are_refused_and_the_daemon_goes_on(home: Home) -> None:
    with pytest.raises(KeditError) as caught:
        control.send_request(home.socket_file, "dance", {})
    assert caught.value.code in ("bad-request", "unknown-command")
    with pytest.raises(KeditError) as caught:
        control.send_request(home.socket_file, "ask", {})
    assert caught.value.code == "bad-request"
    assert "answer" in control.send_request(
        home.socket_file, "ask", {"prompt": "Hello", "max_tokens": 2}
    )


def test_a_second_daemon_for_the_same_home_ends_at_once(home: Home) -> None:
    command = [sys.executable, "-m", "kedit_daemon", "--home", str(home.root), "run"]
    done = subprocess.run(command, capture_output=True, text=True, env=environ(), timeout=60)
    assert done.returncode == 75, done.stderr
    assert home.socket_file.exists()


def test_a_file_that_comes_during_an_edit_is_taken_right_after_it(
    bench: Callable[..., Bench],
) -> None:
    at, one, two = bench(side={"steps": 20}), seat(1, "Oslo"), seat(2, "Lima")
    # By itself, with a time that stands still, it looks into the inbox in its first turn only.
    daemon = Daemon(at.home, at.config, at.store, SystemdNotifier({}), at.clock, lambda: 0.0)
    calls = iter(range(10_000))

    def pulse() -> None:
        if next(calls) == 3:
            record = {"subject": two.subject, "prompt": two.prompt, "target": two.target}
            (at.home.inbox_folder / "dropped.jsonl").write_text(json.dumps(record) + "\n")
            daemon.control_server.requests.put(ControlRequest(WAKE_REQUEST, {}))
        daemon._poll_requests()

    daemon.editor = Editor(at.served, at.config, pulse)
    at.receive(one)
    daemon._run_turn()
    assert [f.id for f in at.store.list_facts()] == [one.id]
    daemon._run_turn()
    daemon._run_turn()  # two scans have to find it the same
    assert {f.id for f in at.store.list_facts()} == {one.id, two.id}


def test_a_switch_is_published_while_the_loop_goes_on(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    at = bench(publish={"kind": "facts", "folder": str(tmp_path / "out")})
    with at.store.db.transaction():
        at.store.db.set_meta("model", at.loaded.name)
        at.store.artifacts.activate_generation(
            at.store.artifacts.add_generation(None, "", 0, "test", [], {})
        )
    daemon = Daemon(at.home, at.config, at.store, SystemdNotifier({}), at.clock, lambda: 0.0)
    daemon.editor = at.editor
    deadline = time.monotonic() + 60
    while at.store.db.get_meta("published") is None:
        assert time.monotonic() < deadline
        daemon.control_server.requests.put(ControlRequest(WAKE_REQUEST, {}))
        daemon._run_turn()
    daemon.publisher.stop()
    (path,) = (tmp_path / "out").iterdir()
    assert (path / "facts.jsonl").is_file()


def test_after_a_torn_turn_no_two_of_anything_are_held(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = bench()
    at.receive(seat(1, "Oslo"))
    at.settle()
    shards, held = set(at.served.side.shards), list[tuple[int, int]]()
    restore = LiveModel.restore

    def watched(served: LiveModel) -> None:
        held.append((len(served.side.shards), len(served.active_deltas)))
        restore(served)

    monkeypatch.setattr(LiveModel, "restore", watched)
    daemon = Daemon(at.home, at.config, at.store, SystemdNotifier({}), at.clock, lambda: 0.0)
    daemon.editor = at.editor
    daemon._needs_recovery = True
    daemon._run_turn()
    assert held == [(0, 0)] and daemon.editor is not at.editor
    assert set(daemon.editor.live_model.side.shards) == shards and shards
    assert at.editor.live_model is daemon.editor.live_model  # so that what it held is gone


def test_a_turn_in_which_another_holds_the_database_comes_again(
    bench: Callable[..., Bench],
) -> None:
    at, fact = bench(side={"steps": 20}), seat(1, "Oslo")
    at.receive(fact)
    at.store.db.conn.execute("PRAGMA busy_timeout=0")
    daemon = Daemon(at.home, at.config, at.store, SystemdNotifier({}), at.clock, lambda: 0.0)
    daemon.editor = at.editor
    with closing(sqlite3.connect(at.home.database_file)) as other:
        other.execute("BEGIN IMMEDIATE")
        daemon._run_turn_or_pause()
    assert at.store.find_fact(fact.id).state is FactState.RECEIVED
    daemon._run_turn_or_pause()
    assert at.store.find_fact(fact.id).state is not FactState.RECEIVED
    assert daemon.disk_pause.reason is None


def make_daemon(at: Bench, monotonic: Callable[[], float]) -> Daemon:
    daemon = Daemon(at.home, at.config, at.store, SystemdNotifier({}), at.clock, monotonic)
    daemon.editor = at.editor
    return daemon


def run_names(at: Bench) -> set[str]:
    return {name for (name,) in at.store.db.conn.execute("SELECT name FROM job_run")}


def test_the_first_fact_of_a_home_waits_for_no_job(bench: Callable[..., Bench]) -> None:
    at = bench(side={"steps": 20})
    assert make_daemon(at, lambda: 0.0)._find_last_runs() == dict.fromkeys(
        ("audit", "consolidate", "expire", "retention"), at.store.db.format_now()
    )
    at.receive(seat(1, "Oslo"))
    assert set(make_daemon(at, lambda: 0.0)._find_last_runs().values()) == {None}


@pytest.mark.parametrize("seconds", [59.0, 61.0])
def test_long_jobs_give_way_to_facts_for_a_minute(
    bench: Callable[..., Bench], seconds: float
) -> None:
    at, now = bench(side={"steps": 5, "batch_facts": 1}), [0.0]
    daemon = make_daemon(at, lambda: now[0])
    daemon.job_schedule.start(daemon._find_last_runs())
    at.receive(*(seat(n, CITIES[n]) for n in range(3)))
    for name in ("audit", "consolidate", "expire", "retention"):
        daemon.job_schedule.due_jobs.put((name, at.store.db.format_now()))
    daemon._run_turn()
    assert run_names(at) == {"expire"}
    now[0] = seconds
    daemon._run_turn()
    assert len(run_names(at)) == (1 if seconds < 60 else 4)
    at.editor.step = lambda: False  # type: ignore[method-assign]
    daemon.control_server.requests.put(ControlRequest(WAKE_REQUEST, {}))
    daemon._run_turn()
    assert len(run_names(at)) == 4
    assert daemon.job_schedule.due_jobs.empty()
    daemon.job_schedule.stop()


def test_a_night_without_facts_in_the_weights_has_nothing_to_consolidate(
    bench: Callable[..., Bench],
) -> None:
    assert run_job(bench().editor, "consolidate") == "no facts in the weights"
