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
    with store.transaction():
        return [store.receive_fact(Fact(s, "{} is", "x"), "f", False).id for s in subjects]


def test_terms_that_are_dropped_are_gone(store: Store) -> None:
    one, two = received(store, "a", "b")
    with store.transaction():
        store.put_terms(one, b"1")
        store.put_terms(two, b"2")
        store.drop_terms(one)
    assert (store.has_terms(one), store.read_terms(two)) == (False, b"2")


def test_terms_are_put_and_replaced(store: Store) -> None:
    [fact_id] = received(store, "a")
    assert not store.has_terms(fact_id)
    with pytest.raises(KeditError) as caught:
        store.read_terms(fact_id)
    assert caught.value.code == "no-terms"
    with store.transaction():
        store.put_terms(fact_id, b"old")
        store.put_terms(fact_id, bytes(range(256)))
    assert store.has_terms(fact_id)
    assert store.read_terms(fact_id) == bytes(range(256))


def test_side_keys_are_listed_by_shard(store: Store) -> None:
    one, two, three = sorted(received(store, "a", "b", "c"))
    with store.transaction():
        store.put_side_keys(one, 2, b"1")
        store.put_side_keys(two, 1, b"2")
        store.put_side_keys(three, 1, b"3")
        store.put_side_keys(two, 2, b"moved")
        store.drop_side_keys(three)
    assert store.list_side_fact_ids() == {r.fact_id for r in store.read_side_keys()} != set()
    assert [(r.fact_id, r.shard, r.blob) for r in store.read_side_keys()] == [
        (one, 2, b"1"),
        (two, 2, b"moved"),
    ]


def test_damaged_terms_are_refused(store: Store) -> None:
    [fact_id] = received(store, "a")
    with store.transaction():
        store.put_terms(fact_id, b"abc")
        store.conn.execute("UPDATE terms SET tensors = ?", (b"abd",))
    with pytest.raises(KeditError, match=f"fact {fact_id} are damaged") as caught:
        store.read_terms(fact_id)
    assert caught.value.code == "corrupt"


def test_damaged_keys_hide_no_others(store: Store) -> None:
    one, two = received(store, "a", "b")
    with store.transaction():
        store.put_side_keys(one, 1, b"abc")
        store.put_side_keys(two, 1, b"abc")
        store.conn.execute("UPDATE side_keys SET tensors = ? WHERE fact_id = ?", (b"abd", one))
    assert [row.fact_id for row in store.read_side_keys()] == [two]
    assert store.list_side_fact_ids() == {one, two}


def test_shards_are_written_once(store: Store) -> None:
    with store.transaction():
        for number, sha in ((1, "aa"), (2, "bb"), (7, "cc")):
            store.add_shard(number, sha, number, 0.5)
        store.drop_shard(2)
    with pytest.raises(sqlite3.IntegrityError), store.transaction():
        store.add_shard(7, "dd", 4, 0.25)
    assert [(row.id, row.sha256, row.facts) for row in store.list_shards()] == [
        (1, "aa", 1),
        (7, "cc", 7),
    ]


def test_the_base_is_generation_0_and_active_at_first(store: Store) -> None:
    base = store.get_generation(0)
    assert (base.sha256, base.parent, base.fact_ids) == (None, None, ())
    assert store.active_generation() == 0


def test_a_generation_is_added_and_then_switched_to(store: Store) -> None:
    ids = received(store, "a", "b")
    with store.transaction():
        number = store.add_generation("aa", "ww", 0, "flush", ids, {"norm": float("inf")})
    assert (number, store.active_generation()) == (1, 0)
    with store.transaction():
        store.activate_generation(number)
    assert store.active_generation() == 1
    last = store.get_generation(1)
    assert (last.weights_hash, last.parent, last.reason) == ("ww", 0, "flush")
    assert last.fact_ids == tuple(ids)
    assert last.figures == {"norm": "inf"}
    assert [g.id for g in store.list_generations()] == [0, 1]
    kind, data = store.conn.execute(
        "SELECT kind, data FROM events ORDER BY seq DESC LIMIT 1"
    ).fetchone()
    assert kind == "generation_switched"
    assert '"from":0' in data and '"to":1' in data


def test_an_unknown_generation_is_neither_active_nor_a_parent(store: Store) -> None:
    with pytest.raises(KeditError, match="no generation 5"), store.transaction():
        store.activate_generation(5)
    with pytest.raises(sqlite3.IntegrityError), store.transaction():
        store.add_generation("aa", "ww", 5, "flush", [], {})
    assert store.active_generation() == 0


def test_the_latest_generations_tell_how_many_facts_gave_which_figures(store: Store) -> None:
    assert store.list_measurements() == []
    with store.transaction():
        store.add_generation("s1", "w1", 0, "flush", ["a", "b"], {"agreement": 0.5})
        store.add_generation(None, "w2", 1, "back", [], {"agreement": 1.0})
        store.add_generation("s3", "w3", 2, "flush", ["a"], {"agreement": 0.75})
    measured = [(1, {"agreement": 0.75}), (2, {"agreement": 0.5})]
    assert store.list_measurements() == measured
    assert store.list_measurements(1) == measured[:1]
