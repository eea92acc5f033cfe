"""Whatever is dropped into the inbox stops nothing and fills nothing; all that is sound is taken.

All of it is explained. What it says reaches neither a terminal nor a page as it came.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hostile_tools
import pytest
from command_line import ROOT, on_terminal
from editing_home import Bench
from hostile_tools import LINES, MOST_BYTES, NAMES, TEXTS, acting

from kedit_daemon.control import ControlRequest
from kedit_daemon.daemon.loop import Daemon
from kedit_daemon.home import Home
from kedit_daemon.ingest.failed_files import list_failed_files, read_failed_report
from kedit_daemon.ingest.taken_files import NOTES
from kedit_daemon.system.sd_notify import SystemdNotifier
from memory.blanks import settle_blanks
from memory.db.queries import open_readonly
from memory.errors import KeditError

MOST_MEMORY = 300 << 20
MOST_SECONDS = 20.0  # of the processor, for one file
HIDDEN = {n for n in map(os.fsdecode, NAMES) if n.startswith(".")}


@dataclass(frozen=True)
class Taken:
    """A home after the whole corpus, and what the process that took it in has told."""

    home: Home
    elsewhere: Path
    things: set[str]
    done: subprocess.CompletedProcess[str]

    @property
    def told(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.done.stdout)
        return found

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        with closing(open_readonly(self.home.database_file)) as conn:
            return [tuple(row) for row in conn.execute(sql)]

    def reports(self) -> dict[str, dict[str, Any]]:
        """By the name that the file had in the inbox."""
        found = {}
        for name in list_failed_files(self.home):
            report = read_failed_report(self.home, name)
            assert report is not None, name
            assert report["file"] not in found
            found[report["file"]] = report
        return found


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Taken:
    folder = tmp_path_factory.mktemp("hostile")
    home, elsewhere = Home(folder / "home"), folder / "elsewhere"
    home.create_folders()
    hostile_tools.drop(home.inbox_folder)
    things = hostile_tools.things(home.inbox_folder, elsewhere)
    command = [sys.executable, hostile_tools.__file__, str(home.root)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environ = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=200)
    return Taken(home, elsewhere, things, done)


def readable(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def test_nothing_ends_the_intake_or_fills_the_memory(taken: Taken) -> None:
    assert (taken.done.returncode, taken.done.stderr) == (0, "")
    assert taken.told["peak"] < MOST_MEMORY
    assert taken.told["slowest"] < MOST_SECONDS
    left = {path.name for path in taken.home.inbox_folder.iterdir()}
    assert left == {"work", "done", "failed", NOTES} | taken.things | HIDDEN
    assert list((taken.home.inbox_folder / "work").iterdir()) == []


@pytest.mark.parametrize("name", LINES)
def test_what_stands_beside_a_bad_record_is_taken(taken: Taken, name: str) -> None:
    subjects = {row[0] for row in taken.rows("SELECT subject FROM facts")}
    assert {f"{where} {name}" for where in ("before", "behind", "first", "last")} <= subjects


@pytest.mark.parametrize("number", range(len(LINES)))
def test_a_bad_record_is_explained(taken: Taken, number: int) -> None:
    reports = taken.reports()
    [line] = reports[f"line {number}.jsonl"]["errors"]
    assert line["line"] == 2
    if list(LINES)[number] != "two":  # in a list that is what it ought to be
        assert [e["line"] for e in reports[f"list {number}.json"]["errors"]] == [2]
    for name in (f"line {number}.jsonl", f"list {number}.json"):
        for error in reports.get(name, {"errors": []})["errors"]:
            assert error["problem"].isprintable() and error["remedy"].isprintable()
            assert len(error["problem"]) > 5 and len(error["remedy"]) > 5, error


def test_every_file_without_a_fact_is_kept_as_it_was_and_explained(taken: Taken) -> None:
    reports, failed = taken.reports(), taken.home.inbox_folder / "failed"
    for name, data in hostile_tools.files().items():
        assert all(e["problem"] and e["remedy"] for e in reports[name]["errors"]), name
        assert all(e["line"] >= 1 for e in reports[name]["errors"])
        assert (failed / name).read_bytes() == data, name
    assert "more than the" in reports["sparse.jsonl"]["errors"][0]["problem"]
    assert (failed / "sparse.jsonl").stat().st_size == 1 << 30 > MOST_BYTES


def test_marks_and_line_ends_do_no_harm(taken: Taken) -> None:
    sql = "SELECT accepted, failed FROM submissions WHERE file_name = 'ends.jsonl'"
    assert taken.rows(sql) == [(2, 0)]


def test_no_name_of_a_file_does_harm(taken: Taken) -> None:
    reports = taken.reports()
    subjects = {row[0] for row in taken.rows("SELECT subject FROM facts")}
    for number, raw in enumerate(NAMES):
        name = os.fsdecode(raw)
        if name in HIDDEN:
            continue
        assert f"name {number}" in subjects, name
        [error] = reports[readable(name)]["errors"]
        assert error["line"] == 2
    assert sorted(p.name for p in taken.home.root.iterdir()) == ["inbox", "state"]
    assert not list(taken.home.root.parent.glob("pwned")) and not Path("pwned").exists()


def test_what_is_no_file_is_refused_and_not_followed(taken: Taken) -> None:
    assert taken.things <= set(taken.told["refused"])
    assert len(taken.things) >= 9
    said = json.dumps(taken.rows("SELECT record FROM facts")) + json.dumps(
        taken.rows("SELECT data FROM events")
    )
    assert "SECRET" not in said and "root:" not in said
    assert [path.name for path in taken.elsewhere.iterdir()] == ["secret.jsonl"]


def test_text_is_stored_as_it_came(taken: Taken) -> None:
    """But for white space within a subject, which is put in order."""
    stored = {row[0]: row[1] for row in taken.rows("SELECT subject, target FROM facts")}
    for key, text in TEXTS.items():
        assert stored[settle_blanks(f"{key} {text}")] == text.strip()


# Of a file that poses as one of our reports --------------------------------------------------


POSING = (
    '{"errors": [{"a":' + "[" * 60_000,
    "[" * 200_000,
    '{"errors": ["x", 3, null]}',
    '{"errors": [{"line": "\x1b[2J", "problem": {"\x1b[2J": 1}, "record": [1]}], "file": {}}',
)


@pytest.mark.parametrize("text", POSING)
def test_nobody_s_file_is_taken_for_a_report(tmp_path: Path, text: str) -> None:
    home = Home(tmp_path / "home")
    home.create_folders()
    (home.inbox_folder / "a.jsonl.error.json").write_text(text)
    os.utime(home.inbox_folder / "a.jsonl.error.json", (1, 1))
    hostile_tools.take_in(home.root)
    [name] = list_failed_files(home)
    report = read_failed_report(home, name)
    assert report is not None and report["file"] == "a.jsonl.error.json"
    assert (home.inbox_folder / "failed" / name).read_text() == text
    # Somebody with the right to write there may still lay one beside it, or something else.
    (home.inbox_folder / "failed" / "0.error.json").write_text(text)
    (home.inbox_folder / "failed" / "pipe.error.json").mkdir()
    for words in (["status"], ["doctor"], ["show", "0"], ["show", "pipe"]):
        code, shown = on_terminal(home, *words)
        assert code in (0, 1, 3) and "unexpected" not in shown, shown
        assert acting(shown) == ""


# Many files --------------------------------------------------------------------------------


def test_between_files_questions_are_answered_and_the_daemon_can_be_stopped(
    bench: Callable[..., Bench],
) -> None:
    at = bench(inbox={"settle_seconds": 0.0})
    made = Daemon(at.home, at.config, at.store, SystemdNotifier({}), at.clock, lambda: 1000.0)
    made.editor = at.editor
    for number in range(3):
        path = at.home.inbox_folder / f"{number}.jsonl"
        path.write_bytes(hostile_tools.good(f"many {number}"))
    at.clock.pass_time(days=3650)
    asked = ControlRequest("ask", {"prompt": "The seat of country 1 is", "max_tokens": 2})
    made.control_server.requests.put(asked)
    made.inbox_scanner.scan_if_due(made._poll_requests)
    assert asked.reply_queue.get_nowait()[0] == 200
    assert len(at.store.list_facts()) == 3
    (at.home.inbox_folder / "late.jsonl").write_bytes(hostile_tools.good("late"))
    made.stop_flag.set()
    made.inbox_scanner.has_changed = True
    with pytest.raises(KeditError, match="stopping"):
        made.inbox_scanner.scan_if_due(made._poll_requests)
    assert len(made.inbox_scanner.inbox.pending_claims()) == 1  # for the next start


def test_what_is_refused_is_written_down_with_its_remedy(bench: Callable[..., Bench]) -> None:
    at = bench()
    made = Daemon(at.home, at.config, at.store, SystemdNotifier({}), at.clock, lambda: 1000.0)
    (at.home.inbox_folder / "link").symlink_to("/etc/passwd")
    made.inbox_scanner.scan_if_due(made._poll_requests)
    sql = "SELECT data FROM events WHERE kind = 'file_refused'"
    [event] = [json.loads(row[0]) for row in at.store.db.conn.execute(sql)]
    assert event["file"] == "link" and event["problem"] and "not followed" in event["remedy"]
