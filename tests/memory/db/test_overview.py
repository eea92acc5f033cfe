import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from reading_tools import TODAY, Days, fill

from memory.db.overview import fetch_overview
from memory.db.queries import open_readonly
from memory.db.store import JOB_OK, Store
from memory.facts import FactState


@pytest.fixture
def conn(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    clock = Days()
    with closing(Store(tmp_path / "kedit.db", clock)) as store:
        fill(store, clock)
    with closing(open_readonly(tmp_path / "kedit.db")) as conn:
        yield conn


def test_the_overview_has_the_numbers(conn: sqlite3.Connection) -> None:
    seen = fetch_overview(conn, TODAY)
    assert seen["states"] == {
        **dict.fromkeys(map(str, FactState), 0),
        "received": 1,
        "live-side": 1,
        "failed": 2,
    }
    assert (seen["generation"], seen["generations"]) == (0, 1)
    assert (seen["model"], seen["pid"], seen["paused"]) == ("tiny", 4121, "disk full")
    assert (seen["device"], seen["started_at"]) == (None, None)
    assert seen["oldest_received_at"] == "2026-03-01T12:00:00.000Z"
    assert (seen["side_keys"], seen["side_bytes"]) == (1, 5)
    assert seen["failed_today"] == 3  # two records and one fact, none of yesterday's
    assert seen["last_audit"]["reasons"] == ["norm"]
    assert seen["jobs"]["audit"]["outcome"] == JOB_OK
    assert seen["jobs"]["expire"]["finished_at"] is None
    assert json.loads(json.dumps(seen)) == seen


def test_the_overview_of_a_new_home_is_empty(tmp_path: Path) -> None:
    Store(tmp_path / "kedit.db", lambda: TODAY).close()
    with closing(open_readonly(tmp_path / "kedit.db")) as conn:
        seen = fetch_overview(conn)
    assert seen["last_audit"] is None
    assert (seen["events"], seen["failed_today"], seen["side_bytes"]) == (0, 0, 0)
    assert (seen["pid"], seen["oldest_received_at"], seen["jobs"]) == (None, None, {})
