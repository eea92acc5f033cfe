import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from editing_home import Clock, seat

from memory.db.follower import Follower
from memory.db.store import Store
from memory.errors import KeditError
from memory.facts import FactState

ROME, OSLO = seat(1, "Rome"), seat(2, "Oslo")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "kedit.db", Clock())
    with made.db.transaction():
        made.receive_fact(ROME, "test.jsonl", False)
        made.receive_fact(OSLO, "test.jsonl", False)
        made.artifacts.add_shard(1, "aa", 1, 0.5)
        made.artifacts.put_side_keys(ROME.id, 1, b"keys")
        made.artifacts.put_side_keys(OSLO.id, 1, b"other keys")
        made.change_state(ROME.id, FactState.LIVE_SIDE, tier="side")
    yield made
    made.close()


@pytest.fixture
def follower(store: Store, tmp_path: Path) -> Iterator[Follower]:
    made = Follower(tmp_path / "kedit.db")
    yield made
    made.close()


def test_it_tells_whether_anyone_has_written(store: Store, follower: Follower) -> None:
    assert [follower.has_changed(), follower.has_changed()] == [True, False]
    with store.db.transaction():
        store.db.set_meta("a", "b")
    assert [follower.has_changed(), follower.has_changed()] == [True, False]
    follower.forget_version()
    assert follower.has_changed()


def test_only_facts_that_are_live_with_all_they_need_are_told(
    store: Store, follower: Follower
) -> None:
    (row,) = follower.list_live_rows()
    assert (row.fact_id, row.shard_id, row.file_sha256, row.threshold) == (ROME.id, 1, "aa", 0.5)
    assert follower.read_live_fact(ROME.id) == (ROME, b"keys")
    with store.db.transaction():
        store.artifacts.put_side_keys(ROME.id, 1, b"newer keys")
    assert follower.list_live_rows() != [row]
    with store.db.transaction():
        store.artifacts.drop_shard(1)
    assert follower.list_live_rows() == []
    with store.db.transaction():
        store.artifacts.drop_side_keys(ROME.id)
    with pytest.raises(KeditError, match="not in the side memory"):
        follower.read_live_fact(ROME.id)


def test_a_moment_stays_what_it_was(store: Store, follower: Follower) -> None:
    with follower.read_snapshot():
        before = follower.list_live_rows()
        with store.db.transaction():
            store.artifacts.drop_side_keys(ROME.id)
        assert follower.list_live_rows() == before
    assert follower.list_live_rows() == []


def test_it_reads_from_any_thread_and_never_writes(follower: Follower) -> None:
    found: list[bool] = []
    reader = threading.Thread(target=lambda: found.append(follower.has_generation(0)))
    reader.start()
    reader.join()
    assert found == [True] and not follower.has_generation(1)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        follower.db.conn.execute("DELETE FROM meta")
