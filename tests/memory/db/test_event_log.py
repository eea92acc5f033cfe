import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory.db import event_log
from memory.db.event_log import Event, append_event, read_head, verify_chain, write_head
from memory.errors import KeditError

AT = "2026-01-02T03:04:05.000Z"


def opened() -> sqlite3.Connection:
    conn = sqlite3.connect(":memory:", isolation_level=None)
    conn.execute(
        "CREATE TABLE events(seq INTEGER PRIMARY KEY, at TEXT, kind TEXT, fact_id TEXT,"
        " data TEXT, previous TEXT, hash TEXT)"
    )
    return conn


def filled(conn: sqlite3.Connection, count: int) -> list[Event]:
    conn.execute("BEGIN IMMEDIATE")
    events = [append_event(conn, AT, "k", f"f{i}", {"n": i, "x": i / 3}) for i in range(count)]
    conn.execute("COMMIT")
    return events


@pytest.fixture
def conn() -> Iterator[sqlite3.Connection]:
    with closing(opened()) as conn:
        yield conn


def test_an_untouched_chain_is_intact(conn: sqlite3.Connection) -> None:
    assert verify_chain(conn, None) == event_log.ChainVerdict(
        True, 0, 0, event_log.GENESIS_HASH, ""
    )
    events = filled(conn, 5)
    last = events[-1]
    assert verify_chain(conn, (last.seq, last.hash)) == event_log.ChainVerdict(
        True, 5, 5, last.hash, ""
    )
    assert verify_chain(conn, (events[2].seq, events[2].hash)).intact


def test_events_are_written_only_inside_a_transaction(conn: sqlite3.Connection) -> None:
    with pytest.raises(KeditError, match="outside a transaction"):
        append_event(conn, AT, "k")
    assert conn.execute("SELECT count(*) FROM events").fetchone() == (0,)


def test_an_event_goes_with_its_transaction(conn: sqlite3.Connection) -> None:
    first = filled(conn, 1)[0]
    conn.execute("BEGIN")
    append_event(conn, AT, "lost")
    conn.execute("ROLLBACK")
    conn.execute("BEGIN")
    kept = append_event(conn, AT, "kept")
    conn.execute("COMMIT")
    assert (kept.seq, kept.previous) == (2, first.hash)
    assert verify_chain(conn, None).intact


@pytest.mark.parametrize("column", ["at", "kind", "fact_id", "data", "previous", "hash"])
@pytest.mark.parametrize("seq", [1, 3, 5])
def test_any_changed_column_is_found(conn: sqlite3.Connection, column: str, seq: int) -> None:
    filled(conn, 5)
    conn.execute(f"UPDATE events SET {column} = {column} || ' ' WHERE seq = ?", (seq,))
    verdict = verify_chain(conn, None)
    assert not verdict.intact
    assert verdict.problem.startswith(f"event {seq} ")
    assert verdict.head_seq == seq - 1


def test_a_removed_event_is_found(conn: sqlite3.Connection) -> None:
    filled(conn, 5)
    conn.execute("DELETE FROM events WHERE seq = 3")
    assert verify_chain(conn, None).problem == "event 3 is missing: event 4 follows event 2"


def test_closing_the_gap_does_not_hide_a_removal(conn: sqlite3.Connection) -> None:
    filled(conn, 5)
    conn.execute("DELETE FROM events WHERE seq = 3")
    conn.execute("UPDATE events SET seq = 3 WHERE seq = 4")
    conn.execute("UPDATE events SET seq = 4 WHERE seq = 5")
    assert verify_chain(conn, None).problem == "event 3 does not follow from the event before it"


def test_a_cut_tail_is_found_against_a_kept_head_alone(conn: sqlite3.Connection) -> None:
    last = filled(conn, 5)[-1]
    conn.execute("DELETE FROM events WHERE seq > 3")
    assert verify_chain(conn, None).intact
    verdict = verify_chain(conn, (last.seq, last.hash))
    assert not verdict.intact
    assert "after 3 are missing" in verdict.problem


def test_a_rewritten_history_is_found_against_a_kept_head(conn: sqlite3.Connection) -> None:
    head = filled(conn, 3)[-1]
    conn.execute("DELETE FROM events")
    conn.execute("BEGIN")
    for _ in range(5):
        append_event(conn, AT, "another story")
    conn.execute("COMMIT")
    assert verify_chain(conn, None).intact
    assert "rewritten" in verify_chain(conn, (head.seq, head.hash)).problem


def test_figures_that_json_lacks_become_words(conn: sqlite3.Connection) -> None:
    conn.execute("BEGIN")
    event = append_event(
        conn, AT, "audit", None, {"norm": {"a": float("nan"), "b": [float("-inf")]}}
    )
    assert event.data == {"norm": {"a": "nan", "b": ["-inf"]}}
    stored = conn.execute("SELECT json_extract(data, '$.norm.a') FROM events").fetchone()
    assert stored == ("nan",)
    assert verify_chain(conn, None).intact


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.text(), values, max_size=3), max_size=5))
def test_whatever_is_written_verifies(data: list[dict[str, object]]) -> None:
    with closing(opened()) as conn:
        conn.execute("BEGIN")
        for item in data:
            append_event(conn, AT, "k", None, item)
        assert verify_chain(conn, None).intact


def test_the_head_is_kept_beside_the_database(conn: sqlite3.Connection, tmp_path: Path) -> None:
    path = tmp_path / event_log.HEAD_FILE
    assert read_head(path) is None
    events = filled(conn, 2)
    for event in events:
        write_head(path, event)
    assert read_head(path) == (2, events[1].hash)
    assert json.loads(path.read_bytes())["at"] == AT


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"seq": 1}', b'{"seq": "x", "hash": ""}'])
def test_a_damaged_head_is_an_error_and_not_a_missing_one(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / event_log.HEAD_FILE
    path.write_bytes(content)
    with pytest.raises(KeditError, match=r"audit\.head") as caught:
        read_head(path)
    assert caught.value.code == "corrupt"
