import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from editing_home import Clock, seat

from memory.db.follower import Follower
from memory.db.store import Store
from memory.errors import KeditError
from memory.facts import State

ROME, OSLO = seat(1, "Rome"), seat(2, "Oslo")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "kedit.db", Clock())
    with made.transaction():
        made.receive(ROME, "test.jsonl", False)
        made.receive(OSLO, "test.jsonl", False)
        made.put_shard(1, "aa", 1, 0.5)
        made.put_side(ROME.id, 1, b"keys")
        made.put_side(OSLO.id, 1, b"other keys")
        made.move(ROME.id, State.LIVE_SIDE, tier="side")
    yield made
    made.close()


@pytest.fixture
def follower(store: Store, tmp_path: Path) -> Iterator[Follower]:
    made = Follower(tmp_path / "kedit.db")
    yield made
    made.close()


def test_it_tells_whether_anyone_has_written(store: Store, follower: Follower) -> None:
    assert [follower.changed(), follower.changed()] == [True, False]
    with store.transaction():
        store.set_meta("a", "b")
    assert [follower.changed(), follower.changed()] == [True, False]
    follower.look_again()
    assert follower.changed()


def test_only_facts_that_are_live_with_all_they_need_are_told(
    store: Store, follower: Follower
) -> None:
    (row,) = follower.live_rows()
    assert (row.fact_id, row.shard, row.file, row.threshold) == (ROME.id, 1, "aa", 0.5)
    assert follower.live(ROME.id) == (ROME, b"keys")
    with store.transaction():
        store.put_side(ROME.id, 1, b"newer keys")
    assert follower.live_rows() != [row]
    with store.transaction():
        store.drop_shard(1)
    assert follower.live_rows() == []
    with store.transaction():
        store.drop_side(ROME.id)
    with pytest.raises(KeditError, match="not in the side memory"):
        follower.live(ROME.id)


def test_a_moment_stays_what_it_was(store: Store, follower: Follower) -> None:
    with follower.moment():
        before = follower.live_rows()
        with store.transaction():
            store.drop_side(ROME.id)
        assert follower.live_rows() == before
    assert follower.live_rows() == []


def test_it_reads_from_any_thread_and_never_writes(follower: Follower) -> None:
    found: list[bool] = []
    reader = threading.Thread(target=lambda: found.append(follower.known(0)))
    reader.start()
    reader.join()
    assert found == [True] and not follower.known(1)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        follower.conn.execute("DELETE FROM meta")
