import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from reading_tools import TODAY, Days, fill

from memory.db.overview import fetch_overview
from memory.db.queries import (
    fetch_event_page,
    fetch_events,
    fetch_fact_detail,
    fetch_fact_page,
    fetch_facts,
    fetch_facts_by_id,
    fetch_generations,
    find_answer_before,
    find_similar_ids,
    find_weights_facts,
    open_readonly,
)
from memory.db.store import Store
from memory.errors import KeditError
from memory.facts import Fact, FactState


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a? #%20.db"


@pytest.fixture
def ids(path: Path) -> list[str]:
    clock = Days()
    with closing(Store(path, clock)) as store:
        return fill(store, clock)


@pytest.fixture
def conn(path: Path, ids: list[str]) -> Iterator[sqlite3.Connection]:
    with closing(open_readonly(path)) as conn:
        yield conn


def test_a_writer_behind_a_mount_that_is_read_only_is_seen(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.statvfs

    def read_only(of: Path) -> os.statvfs_result:
        figures = list(real(of))
        figures[8] |= os.ST_RDONLY
        return os.statvfs_result(figures)

    monkeypatch.setattr(os, "statvfs", read_only)
    with closing(Store(path, Days())) as store:
        store.db.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with closing(open_readonly(path)) as conn:
            before = len(list(fetch_events(conn)))
            with store.db.transaction():
                store.db.write_event("daemon_stopped")
            assert len(list(fetch_events(conn))) == before + 1


def test_a_missing_database_names_the_remedy_and_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(KeditError) as caught:
        open_readonly(tmp_path / "kedit.db")
    assert (caught.value.code, caught.value.hint) == ("no-home", "kedit-daemon init")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("content", "code"), [(b"", "no-home"), (b"x" * 5000, "unreadable")])
def test_a_file_that_is_not_a_database_is_an_error(
    tmp_path: Path, content: bytes, code: str
) -> None:
    (tmp_path / "kedit.db").write_bytes(content)
    with pytest.raises(KeditError) as caught:
        open_readonly(tmp_path / "kedit.db")
    assert caught.value.code == code


def test_nothing_can_be_written(conn: sqlite3.Connection) -> None:
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        conn.execute("DELETE FROM meta")


def test_reading_and_writing_do_not_wait_for_each_other(path: Path, ids: list[str]) -> None:
    with closing(Store(path, lambda: TODAY)) as store, closing(open_readonly(path)) as conn:
        with store.db.transaction():
            store.change_state(ids[2], FactState.LIVE_SIDE, tier="side")
            assert fetch_overview(conn)["states"]["live-side"] == 1
        assert fetch_overview(conn)["states"]["live-side"] == 2
        half_read = fetch_events(conn)
        next(half_read)
        with store.db.transaction():
            store.db.set_meta("a", "b")


def test_facts_are_found_by_state_and_subject(conn: sqlite3.Connection, ids: list[str]) -> None:
    assert [row["id"] for row in fetch_facts(conn)] == ids
    assert [row["id"] for row in fetch_facts(conn, "failed")] == [ids[1], ids[3]]
    assert [row["id"] for row in fetch_facts(conn, None, "äRZ")] == [ids[0]]
    assert [row["id"] for row in fetch_facts(conn, None, "lake_")] == [ids[2]]
    assert [row["id"] for row in fetch_facts(conn, "failed", "LAKE")] == [ids[1]]
    assert fetch_facts(conn, "failed", "%") == []
    first = fetch_facts(conn, "live-side")[0]
    assert (first["before"], first["after"], first["direct"]) == ("Köln", "Berlin", True)


def test_one_fact_has_its_whole_history(conn: sqlite3.Connection, ids: list[str]) -> None:
    seen = fetch_fact_detail(conn, "band")
    assert seen is not None
    assert seen == fetch_fact_detail(conn, ids[0])
    assert seen["record"]["subject"] == "Ärzte"
    assert (seen["terms_bytes"], seen["side_bytes"]) == (3, 5)
    assert [(e["seconds"], e["probe"]) for e in seen["edits"]] == [(2.5, {"ok": True})]
    assert [e["kind"] for e in seen["events"]] == ["fact_received", "fact_live-side"]
    assert seen["events"][1]["data"]["after"] == "Berlin"
    assert json.loads(json.dumps(seen)) == seen
    failed = fetch_fact_detail(conn, ids[1])
    assert failed is not None
    assert (failed["terms_bytes"], failed["probe"]) == (None, {"ok": False})
    assert fetch_fact_detail(conn, "nothing") is None


def test_events_are_chosen(conn: sqlite3.Connection, ids: list[str]) -> None:
    every = list(fetch_events(conn))
    assert [e["seq"] for e in every] == list(range(1, 9))
    assert [e["seq"] for e in fetch_events(conn, after_seq=6)] == [7, 8]
    assert [e["seq"] for e in fetch_events(conn, since="2026-03-02")] == [6, 7, 8]
    assert [e["seq"] for e in fetch_events(conn, kinds=["audit"])] == [8]
    assert [e["seq"] for e in fetch_events(conn, fact="band", kinds=["fact_live-side"])] == [6]
    assert list(fetch_events(conn, fact="nothing")) == []
    assert [e["seq"] for e in fetch_events(conn, last=2)] == [7, 8]
    assert [e["seq"] for e in fetch_events(conn, kinds=["fact_live-side", "audit"])] == [6, 8]
    assert [e["fact_id"] for e in fetch_events(conn, subject="äRZ", last=1)] == [ids[0]]
    failed = {e["fact_id"] for e in fetch_events(conn, state="failed")}
    assert failed == {ids[1], ids[3]}
    assert list(fetch_events(conn, state="failed", subject="Ärzte")) == []


def test_the_answer_until_an_event(conn: sqlite3.Connection, ids: list[str]) -> None:
    assert find_answer_before(conn, ids[0], 7) == "Berlin"
    assert find_answer_before(conn, ids[0], 6) is None
    assert find_answer_before(conn, "nothing", 9) is None


def test_a_mistyped_name_suggests_a_fact(conn: sqlite3.Connection, ids: list[str]) -> None:
    assert find_similar_ids(conn, ids[2][:-1])[0] == ids[2]
    assert find_similar_ids(conn, "bend") == []
    assert find_similar_ids(conn, "bans")[0] == "band"
    assert find_similar_ids(conn, "ÄRZTE") == [ids[0]]
    assert find_similar_ids(conn, "nothing") == []


def test_reading_needs_none_of_the_heavy_parts(path: Path, ids: list[str]) -> None:
    code = f"""
import sys
from pathlib import Path
from memory.db import event_log
from memory.db import overview
from memory.db import queries
conn = queries.open_readonly(Path({str(path)!r}))
assert overview.fetch_overview(conn)["events"] == 8
assert event_log.verify_chain(conn, None).intact
heavy = {{"torch", "sqlite_utils", "pydantic", "rich", "numpy", "click"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pages_go_back_from_the_newest(ids: list[str], path: Path) -> None:
    with closing(open_readonly(path)) as conn:
        newest = fetch_fact_page(conn, None, None, None, 3)
        assert [row["id"] for row in newest] == [ids[3], ids[2], ids[1]]
        assert [row["id"] for row in fetch_fact_page(conn, None, None, newest[-1]["seq"], 3)] == [
            ids[0]
        ]
        assert [row["id"] for row in fetch_fact_page(conn, "ÄRZTE ARE", None, None, 3)] == [ids[0]]
        assert [row["id"] for row in fetch_fact_page(conn, "BAND", "live-side", None, 3)] == [
            ids[0]
        ]
        assert fetch_fact_page(conn, "lake%", None, None, 3) == []
        events = fetch_event_page(conn, {}, None, 100)
        assert [e["seq"] for e in events] == list(range(len(events), 0, -1))
        older = fetch_event_page(conn, {}, events[1]["seq"], 2)
        assert [e["seq"] for e in older] == [e["seq"] for e in events[2:4]]
        assert {e["fact_id"] for e in fetch_event_page(conn, {"subject": "ärzte"}, None, 9)} == {
            ids[0]
        }
        assert fetch_event_page(conn, {"fact": "band", "kind": "fact_received"}, None, 9)[0][
            "said"
        ] == {
            "subject": "Ärzte",
            "prompt": "{} are from",
            "target": "Berlin",
        }
        assert fetch_event_page(conn, {"kind": "audit"}, None, 9)[0]["said"] is None
        assert [row["id"] for row in fetch_facts_by_id(conn, [ids[2], "x", ids[0]])] == [
            ids[0],
            ids[2],
        ]
        (first,) = fetch_generations(conn, 5)
        written = conn.execute("SELECT weights_hash FROM generations").fetchone()[0]
        assert (first["id"], first["facts"], first["weights_hash"]) == (0, 0, written)


def test_which_facts_in_the_weights_ask_just_this(path: Path) -> None:
    eyre = Fact("Lake Eyre", "{} lies in", "Australia", paraphrases=("Where {} is:", "Its land:"))
    beside = Fact("Lake Chad", "{} lies in", "Chad", paraphrases=("Its land:",))
    with closing(Store(path, Days())) as store, store.db.transaction():
        for fact in (eyre, beside):
            store.receive_fact(fact, "a.jsonl", direct=False)
        store.change_state(eyre.id, FactState.LIVE_WEIGHTS, tier="weights", generation=1)
        store.change_state(beside.id, FactState.LIVE_SIDE, tier="side")
    with closing(open_readonly(path)) as conn:
        for prompt in ("Lake Eyre lies in", "Where Lake Eyre is:", "Its land:"):
            assert [row["id"] for row in find_weights_facts(conn, prompt)] == [eyre.id]
        for prompt in ("Lake Eyre lies", "lake eyre lies in", "Lake Chad lies in", ""):
            assert find_weights_facts(conn, prompt) == []
