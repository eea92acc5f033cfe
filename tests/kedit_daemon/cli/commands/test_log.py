import csv
import json
import signal
import sqlite3
import subprocess
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import Result
from command_line import EYRE, NOW, called, make_home, on_terminal, process, read

from kedit_daemon.home import Home
from memory.db.store import Store
from memory.facts import FactState


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "home")


def kinds(result: Result) -> list[str]:
    return [json.loads(line)["kind"] for line in result.stdout.splitlines()]


def test_the_log_tells_what_changed_and_the_answers(home: Home) -> None:
    text = called(home, "log").stdout
    for part in ("#1  2026-03-01 12:00:00  fact_received", "answer  [-Egypt-] {+Australia+}"):
        assert part in text
    assert "Oslo lies in → Norway" in text


def test_the_log_can_be_narrowed_down(home: Home) -> None:
    assert len(kinds(called(home, "log", "--json"))) == 7
    assert kinds(called(home, "log", "--json", "--kind", "audit")) == ["audit"]
    assert kinds(called(home, "log", "--json", "--fact", "mine")) == [
        "fact_received",
        "fact_live-side",
    ]
    # 13:00 an hour east of Greenwich is 12:00, when everything happened.
    for since, count in (
        ("2026-03-01", 7),
        ("2026-03-01T12:00", 7),
        ("2026-03-01T13:00:00+01:00", 7),
        ("2026-03-01T12:00:01Z", 0),
        ("99999w", 7),
    ):
        assert len(kinds(called(home, "log", "--json", "--since", since))) == count, since


@pytest.mark.parametrize("since", ["yesterday", "", "2026-13-01", "999999w", "-1h"])
def test_a_moment_that_is_none(home: Home, since: str) -> None:
    assert called(home, "log", "--since", since).exit_code == 2


def test_following_tells_what_comes(home: Home) -> None:
    child = process(home, "log", "--follow", "--json", stdout=subprocess.PIPE)
    assert child.stdout is not None
    for _ in range(7):
        child.stdout.readline()
    store = Store(home.database_file, lambda: NOW)
    with store.db.transaction():
        store.db.write_event("later")
    store.close()
    assert json.loads(child.stdout.readline())["kind"] == "later"
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 0
    child.stdout.close()


def test_options_before_a_subcommand_are_not_lost_silently(home: Home) -> None:
    assert called(home, "log", "--json", "verify").exit_code == 2


def test_verify_an_intact_log(home: Home) -> None:
    result = called(home, "log", "verify")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("intact: 7 events")
    verdict = read(called(home, "log", "verify", "--json"))
    assert (verdict["intact"], verdict["events"], verdict["kept_head"]["seq"]) == (True, 7, 7)
    home.head_file.unlink()
    assert "no head has been kept" in called(home, "log", "verify").stderr


def changed(conn: sqlite3.Connection) -> None:
    conn.execute("UPDATE events SET data = '{}' WHERE seq = 3")


def cut_off(conn: sqlite3.Connection) -> None:
    conn.execute("DELETE FROM events WHERE seq > 5")


@pytest.mark.parametrize(
    ("harm", "problem"),
    [(changed, "event 3 has been changed"), (cut_off, "the events after 5 are missing")],
)
def test_verify_a_broken_log(
    home: Home, harm: Callable[[sqlite3.Connection], None], problem: str
) -> None:
    with sqlite3.connect(home.database_file) as conn:
        conn.execute("DROP TRIGGER events_no_update")
        conn.execute("DROP TRIGGER events_no_delete")
        harm(conn)
    conn.close()
    result = called(home, "log", "verify")
    assert result.exit_code == 1
    assert result.stdout.startswith(f"broken: {problem}")
    found = called(home, "log", "verify", "--json")
    assert (found.exit_code, read(found)["intact"]) == (1, False)


def test_colours_are_for_terminals(home: Home) -> None:
    _, seen = on_terminal(home, "log", "--fact", "mine")
    assert "\x1b[9mEgypt\x1b[0m" in seen
    assert "[-" not in seen
    _, seen = on_terminal(home, "log", "--fact", "mine", NO_COLOR="1")
    assert "[-Egypt-] {+Australia+}" in seen
    assert "\x1b" not in seen


def test_filters_work_together(home: Home) -> None:
    live = ["fact_live-side", "fact_live-weights"]
    assert kinds(called(home, "log", "--json", *(f"--kind={k}" for k in live))) == live
    assert kinds(called(home, "log", "--json", "--subject", "EYRE", "--limit", "1")) == live[:1]
    assert kinds(called(home, "log", "--json", "--state", "live-weights")) == [
        "fact_received",
        "fact_live-weights",
    ]
    assert kinds(called(home, "log", "--json", "--state", "received", "--subject", "eyre")) == []


def test_what_is_mistyped_is_an_error_that_suggests(home: Home) -> None:
    kind = called(home, "log", "--kind", "fact_revertd")
    assert (kind.exit_code, "Did you mean fact_reverted?" in kind.stderr) == (2, True)
    fact = called(home, "log", "--fact", EYRE.id[:-1])
    assert (fact.exit_code, f"did you mean {EYRE.id}?" in fact.stderr) == (1, True)
    assert called(home, "log", "export", "--fact", "nothing").exit_code == 1


def test_a_revert_tells_the_answer_that_went(home: Home) -> None:
    store = Store(home.database_file, lambda: NOW)
    with store.db.transaction():
        store.change_state(EYRE.id, FactState.REVERTED, reason="wrong", after="Egypt")
    store.close()
    text = called(home, "log", "--kind", "fact_reverted").stdout
    assert "answer  [-Australia-] {+Egypt+}" in text
    assert "| ~~Australia~~ **Egypt** |" in called(home, "log", "export", "--format", "md").stdout
    # What scripts read is what was written down.
    assert read(called(home, "log", "--kind", "fact_reverted", "--json"))["data"]["before"] is None


def test_following_begins_with_the_last_few(home: Home) -> None:
    child = process(home, "log", "--follow", "--json", "--limit", "1", stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert json.loads(child.stdout.readline())["seq"] == 7
    store = Store(home.database_file, lambda: NOW)
    with store.db.transaction():
        store.db.write_event("later")
        store.db.write_event("later")
    store.close()
    assert [json.loads(child.stdout.readline())["seq"] for _ in range(2)] == [8, 9]
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 0
    child.stdout.close()


def test_export(home: Home) -> None:
    lines = [json.loads(line) for line in called(home, "log", "export").stdout.splitlines()]
    assert [line["seq"] for line in lines] == list(range(1, 8))
    assert all(after["previous"] == line["hash"] for line, after in pairwise(lines))
    table = called(home, "log", "export", "--format", "md").stdout.splitlines()
    assert len(table) == 2 + 7
    assert all(row.startswith("| ") or row.startswith("|-") for row in table)
    sheet = called(home, "log", "export", "--format", "csv").stdout
    rows = list(csv.DictReader(sheet.splitlines()))
    assert [row["seq"] for row in rows] == [str(n) for n in range(1, 8)]
    assert (rows[3]["before"], rows[3]["after"]) == ("Egypt", "Australia")
    assert [row["hash"] for row in rows] == [line["hash"] for line in lines]
    assert all(c.isprintable() or c == "\n" for c in sheet)


def test_a_part_of_the_log_can_be_exported(home: Home) -> None:
    part = called(home, "log", "export", "--kind", "audit", "--since", "2026-03-01")
    assert kinds(part) == ["audit"]
