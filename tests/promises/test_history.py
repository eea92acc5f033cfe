"""Whoever changes what has happened is found, at the event that was changed."""

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from command_line import NOW, called, make_home

from kedit_daemon.home import Home
from memory.db import event_log
from memory.db.store import Store

EVENTS = 9
COLUMNS = "at, kind, fact_id, data, previous, hash"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A home with nine events, of which all are anchored."""
    home = make_home(tmp_path / "home")
    store = Store(home.database_file, lambda: NOW)
    with store.db.transaction():
        for number in range(EVENTS - 7):
            newest = store.db.write_event("retention", lost=[], figures={"oldest": number})
    store.close()
    event_log.write_head(home.head_file, newest)
    return home


def tamper(home: Home, change: Callable[[sqlite3.Connection], object]) -> None:
    """As somebody would who may write to the database: the triggers are no lock."""
    with closing(sqlite3.connect(home.database_file, isolation_level=None)) as conn:
        for trigger in ("events_no_update", "events_no_delete", "events_no_replace"):
            conn.execute(f"DROP TRIGGER {trigger}")
        conn.execute("BEGIN")
        change(conn)
        conn.execute("COMMIT")


def found(home: Home) -> tuple[int, int, str]:
    """The exit code of `log verify`, how many events are intact, and what it says of the next."""
    result = called(home, "log", "verify", "--json")
    told = json.loads(result.stdout)
    assert told["intact"] == (result.exit_code == 0) == (not told["problem"])
    return result.exit_code, told["events"], told["problem"]


def forge(conn: sqlite3.Connection, first: int, last: int) -> None:
    """Other events from `first` to `last`, each with the hash that belongs to it."""
    conn.execute("DELETE FROM events WHERE seq >= ?", (first,))
    for _ in range(first, last + 1):
        event_log.append_event(conn, "2026-03-01T12:00:00.000Z", "retention", None, {"lost": []})


def rows(conn: sqlite3.Connection) -> dict[int, tuple[Any, ...]]:
    found = conn.execute(f"SELECT seq, {COLUMNS} FROM events ORDER BY seq")
    return {row[0]: row[1:] for row in found}


def test_what_nobody_has_touched_is_intact(home: Home) -> None:
    assert found(home) == (0, EVENTS, "")


@pytest.mark.parametrize("column", COLUMNS.split(", "))
@pytest.mark.parametrize("seq", [1, 5, EVENTS])
def test_an_edit(home: Home, column: str, seq: int) -> None:
    change = f"UPDATE events SET {column} = coalesce({column}, '') || ' ' WHERE seq = {seq}"
    tamper(home, lambda conn: conn.execute(change))
    code, intact, problem = found(home)
    assert (code, intact) == (1, seq - 1)
    assert problem.startswith(f"event {seq} ")


def test_an_edit_with_its_own_hash_made_anew_is_found_at_the_next(home: Home) -> None:
    def change(conn: sqlite3.Connection) -> None:
        at, kind, fact_id, _, previous, _ = rows(conn)[4]
        digest = event_log._hash_event(4, at, kind, fact_id, "{}", previous)
        conn.execute("UPDATE events SET data = '{}', hash = ? WHERE seq = 4", (digest,))

    tamper(home, change)
    assert found(home) == (1, 4, "event 5 does not follow from the event before it")


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("seq", [1, 5, EVENTS - 1])
def test_a_removal(home: Home, seq: int, closed: bool) -> None:
    def change(conn: sqlite3.Connection) -> None:
        conn.execute("DELETE FROM events WHERE seq = ?", (seq,))
        for later in range(seq + 1, EVENTS + 1) if closed else ():
            conn.execute("UPDATE events SET seq = seq - 1 WHERE seq = ?", (later,))

    tamper(home, change)
    code, intact, problem = found(home)
    assert (code, intact) == (1, seq - 1)
    assert problem.startswith(f"event {seq} " + ("does not follow" if closed else "is missing"))


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("one", "two"), [(1, 2), (4, 5), (2, 8), (EVENTS - 1, EVENTS)])
def test_another_order(home: Home, one: int, two: int, whole: bool) -> None:
    """With the hashes where they were, or with those that the events brought along."""
    columns = (COLUMNS if whole else COLUMNS.removesuffix(", previous, hash")).split(", ")

    def change(conn: sqlite3.Connection) -> None:
        were = rows(conn)
        settings = ", ".join(f"{c} = ?" for c in columns)
        for to, origin in ((one, two), (two, one)):
            values = were[origin][: len(columns)]
            conn.execute(f"UPDATE events SET {settings} WHERE seq = ?", (*values, to))

    tamper(home, change)
    code, intact, problem = found(home)
    assert (code, intact) == (1, one - 1)
    said = "does not follow from the event before it" if whole else "has been changed"
    assert problem == f"event {one} {said}"


@pytest.mark.parametrize("left", [0, 1, 5, EVENTS - 1])
def test_an_end_that_was_cut_off(home: Home, left: int) -> None:
    tamper(home, lambda conn: conn.execute("DELETE FROM events WHERE seq > ?", (left,)))
    said = f"the events after {left} are missing: the kept head is event {EVENTS}"
    assert found(home) == (1, left, said)
    home.head_file.unlink()  # what was kept outside is what tells
    assert found(home) == (0, left, "")


@pytest.mark.parametrize("last", [EVENTS, EVENTS + 3])
@pytest.mark.parametrize("first", [1, 5, EVENTS])
def test_a_forged_end_with_hashes_made_anew(home: Home, first: int, last: int) -> None:
    """All hashes are right, so only the anchored event tells that they are others."""
    tamper(home, lambda conn: forge(conn, first, last))
    said = f"event {EVENTS} differs from the kept head: history has been rewritten"
    assert found(home) == (1, EVENTS - 1, said)
    home.head_file.unlink()
    assert found(home) == (0, last, "")


def test_a_forged_end_that_is_shorter(home: Home) -> None:
    tamper(home, lambda conn: forge(conn, 4, 6))
    assert found(home) == (1, 6, f"the events after 6 are missing: the kept head is event {EVENTS}")


def test_what_came_after_the_kept_head_is_not_vouched_for(home: Home) -> None:
    """What the documents say of it: until it is anchored, an end can be forged."""
    store = Store(home.database_file, lambda: NOW)
    with store.db.transaction():
        store.db.write_event("daemon_stopped")
    store.close()
    tamper(home, lambda conn: forge(conn, EVENTS + 1, EVENTS + 1))
    assert found(home) == (0, EVENTS + 1, "")
