import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest

from memory.db.store import Store
from memory.errors import KeditError
from memory.facts import Fact


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path / "kedit.db", lambda: datetime.now(UTC))) as store:
        yield store


def received(store: Store, *subjects: str) -> list[str]:
    with store.db.transaction():
        return [store.receive_fact(Fact(s, "{} is", "x"), "f", False).id for s in subjects]


def test_terms_that_are_dropped_are_gone(store: Store) -> None:
    one, two = received(store, "a", "b")
    with store.db.transaction():
        store.artifacts.put_terms(one, b"1")
        store.artifacts.put_terms(two, b"2")
        store.artifacts.drop_terms(one)
    assert (store.artifacts.has_terms(one), store.artifacts.read_terms(two)) == (False, b"2")


def test_terms_are_put_and_replaced(store: Store) -> None:
    [fact_id] = received(store, "a")
    assert not store.artifacts.has_terms(fact_id)
    with pytest.raises(KeditError) as caught:
        store.artifacts.read_terms(fact_id)
    assert caught.value.code == "no-terms"
    with store.db.transaction():
        store.artifacts.put_terms(fact_id, b"old")
        store.artifacts.put_terms(fact_id, bytes(range(256)))
    assert store.artifacts.has_terms(fact_id)
    assert store.artifacts.read_terms(fact_id) == bytes(range(256))


def test_side_keys_are_listed_by_shard(store: Store) -> None:
    one, two, three = sorted(received(store, "a", "b", "c"))
    with store.db.transaction():
        store.artifacts.put_side_keys(one, 2, b"1")
        store.artifacts.put_side_keys(two, 1, b"2")
        store.artifacts.put_side_keys(three, 1, b"3")
        store.artifacts.put_side_keys(two, 2, b"moved")
        store.artifacts.drop_side_keys(three)
    assert (
        store.artifacts.list_side_fact_ids()
        == {r.fact_id for r in store.artifacts.read_side_keys()}
        != set()
    )
    assert [(r.fact_id, r.shard, r.blob) for r in store.artifacts.read_side_keys()] == [
        (one, 2, b"1"),
        (two, 2, b"moved"),
    ]


def test_damaged_terms_are_refused(store: Store) -> None:
    [fact_id] = received(store, "a")
    with store.db.transaction():
        store.artifacts.put_terms(fact_id, b"abc")
        store.db.conn.execute("UPDATE terms SET tensors = ?", (b"abd",))
    with pytest.raises(KeditError, match=f"fact {fact_id} are damaged") as caught:
        store.artifacts.read_terms(fact_id)
    assert caught.value.code == "corrupt"


def test_damaged_keys_hide_no_others(store: Store) -> None:
    one, two = received(store, "a", "b")
    with store.db.transaction():
        store.artifacts.put_side_keys(one, 1, b"abc")
        store.artifacts.put_side_keys(two, 1, b"abc")
        store.db.conn.execute("UPDATE side_keys SET tensors = ? WHERE fact_id = ?", (b"abd", one))
    assert [row.fact_id for row in store.artifacts.read_side_keys()] == [two]
    assert store.artifacts.list_side_fact_ids() == {one, two}


def test_shards_are_written_once(store: Store) -> None:
    with store.db.transaction():
        for number, sha in ((1, "aa"), (2, "bb"), (7, "cc")):
            store.artifacts.add_shard(number, sha, number, 0.5)
        store.artifacts.drop_shard(2)
    with pytest.raises(sqlite3.IntegrityError), store.db.transaction():
        store.artifacts.add_shard(7, "dd", 4, 0.25)
    assert [(row.id, row.sha256, row.facts) for row in store.artifacts.list_shards()] == [
        (1, "aa", 1),
        (7, "cc", 7),
    ]


def test_the_base_is_generation_0_and_active_at_first(store: Store) -> None:
    base = store.artifacts.get_generation(0)
    assert (base.sha256, base.parent, base.fact_ids) == (None, None, ())
    assert store.artifacts.active_generation() == 0


def test_a_generation_is_added_and_then_switched_to(store: Store) -> None:
    ids = received(store, "a", "b")
    with store.db.transaction():
        number = store.artifacts.add_generation("aa", "ww", 0, "flush", ids, {"norm": float("inf")})
    assert (number, store.artifacts.active_generation()) == (1, 0)
    with store.db.transaction():
        store.artifacts.activate_generation(number)
    assert store.artifacts.active_generation() == 1
    last = store.artifacts.get_generation(1)
    assert (last.weights_hash, last.parent, last.reason) == ("ww", 0, "flush")
    assert last.fact_ids == tuple(ids)
    assert last.figures == {"norm": "inf"}
    kind, data = store.db.conn.execute(
        "SELECT kind, data FROM events ORDER BY seq DESC LIMIT 1"
    ).fetchone()
    assert kind == "generation_switched"
    assert '"from":0' in data and '"to":1' in data


def test_an_unknown_generation_is_neither_active_nor_a_parent(store: Store) -> None:
    with pytest.raises(KeditError, match="no generation 5"), store.db.transaction():
        store.artifacts.activate_generation(5)
    with pytest.raises(sqlite3.IntegrityError), store.db.transaction():
        store.artifacts.add_generation("aa", "ww", 5, "flush", [], {})
    assert store.artifacts.active_generation() == 0


def test_the_latest_generations_tell_how_many_facts_gave_which_figures(store: Store) -> None:
    assert store.artifacts.list_measurements() == []
    with store.db.transaction():
        store.artifacts.add_generation("s1", "w1", 0, "flush", ["a", "b"], {"agreement": 0.5})
        store.artifacts.add_generation(None, "w2", 1, "back", [], {"agreement": 1.0})
        store.artifacts.add_generation("s3", "w3", 2, "flush", ["a"], {"agreement": 0.75})
    measured = [(1, {"agreement": 0.75}), (2, {"agreement": 0.5})]
    assert store.artifacts.list_measurements() == measured
    assert store.artifacts.list_measurements(1) == measured[:1]
