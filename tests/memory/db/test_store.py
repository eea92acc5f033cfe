import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from memory.db import event_log
from memory.db.queries import fetch_audits, open_readonly
from memory.db.store import JOB_INTERRUPTED, JOB_OK, Store
from memory.errors import KeditError
from memory.facts import Fact, FactState

EYRE = Fact("Lake Eyre", "{} lies in", "Australia", ("Where is {}?",), external_id="mine")


class Clock:
    """A clock in Tokyo that goes on one second per look."""

    def __init__(self) -> None:
        self.moment = datetime(2026, 1, 1, 9, tzinfo=timezone(timedelta(hours=9)))

    def __call__(self) -> datetime:
        self.moment += timedelta(seconds=1)
        return self.moment


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kedit.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with closing(Store(path, Clock())) as store:
        yield store


def received(store: Store, fact: Fact = EYRE) -> str:
    with store.db.transaction():
        return store.receive_fact(fact, "a.jsonl", False).id


def events(store: Store) -> list[tuple[str, str | None]]:
    rows = store.db.conn.execute("SELECT kind, fact_id FROM events ORDER BY seq")
    return [(kind, fact_id) for kind, fact_id in rows]


def test_a_fact_is_received_whole(store: Store) -> None:
    fact_id = received(store)
    stored = store.find_fact(fact_id)
    assert stored is not None
    assert stored.fact == EYRE
    assert (stored.state, stored.seq, stored.direct) == (FactState.RECEIVED, 1, False)
    assert (stored.file_name, stored.attempts, stored.probe) == ("a.jsonl", 0, None)
    assert store.find_fact("mine") == stored
    assert store.find_fact("nothing") is None
    assert events(store) == [("fact_received", fact_id)]


def test_a_name_that_is_not_utf8_is_stored_readably(store: Store) -> None:
    with store.db.transaction():
        stored = store.receive_fact(EYRE, "a\udcff.jsonl", False)
    assert stored.file_name == "a\\udcff.jsonl"


def test_the_owners_id_means_the_active_fact_and_else_the_newest(store: Store) -> None:
    old = received(store, Fact("a", "b", "old", external_id="x"))
    new = received(store, Fact("a", "b", "new", external_id="x"))
    assert (found := store.find_fact("x")) is not None and found.id == new
    with store.db.transaction():
        store.change_state(new, FactState.REJECTED)
    assert (found := store.find_fact("x")) is not None and found.id == old
    with store.db.transaction():
        store.change_state(old, FactState.REVERTED)
    assert (found := store.find_fact("x")) is not None and found.id == new


def test_facts_are_listed_by_state_and_slot_in_order(store: Store) -> None:
    ids = [received(store, Fact("a", "{} b", str(n))) for n in range(3)]
    other = received(store, Fact("c", "{} d", "e"))
    with store.db.transaction():
        store.change_state(ids[1], FactState.LIVE_SIDE, tier="side")
    assert [f.id for f in store.list_facts()] == [*ids, other]
    assert [f.id for f in store.list_facts([FactState.RECEIVED])] == [ids[0], ids[2], other]
    slot = store.list_facts([FactState.RECEIVED, FactState.LIVE_SIDE], Fact("a", "a b", "").slot)
    assert [f.id for f in slot] == ids


def test_an_active_fact_is_not_received_again(store: Store) -> None:
    fact_id = received(store)
    with pytest.raises(KeditError) as caught:
        received(store)
    assert caught.value.code == "duplicate"
    with store.db.transaction():
        store.change_state(fact_id, FactState.LIVE_WEIGHTS, tier="weights", generation=0)
    with pytest.raises(KeditError, match="live-weights"):
        received(store)


def test_an_ended_fact_starts_from_nothing_when_it_comes_back(store: Store) -> None:
    fact_id = received(store)
    received(store, Fact("c", "{} d", "e"))
    with store.db.transaction():
        store.count_attempt(fact_id)
        store.change_state(
            fact_id, FactState.REVERTED, reason="r", before="b", after="a", probe={"ok": 1}
        )
        store.artifacts.put_terms(fact_id, b"kept")
        again = store.receive_fact(
            Fact(EYRE.subject, EYRE.prompt, EYRE.target, tags=("new",)), "b.jsonl", True
        )
    assert again.fact.tags == ("new",)
    assert (again.seq, again.state, again.direct) == (3, FactState.RECEIVED, True)
    assert (again.reason, again.before, again.after, again.probe) == (None, None, None, None)
    assert (again.file_name, again.attempts) == ("b.jsonl", 0)
    assert [kind for kind, _ in events(store)][-1] == "fact_revived"
    assert store.artifacts.read_terms(fact_id) == b"kept"


def test_a_move_changes_the_fact_and_tells_why(store: Store) -> None:
    fact_id = received(store)
    with store.db.transaction():
        store.change_state(
            fact_id,
            FactState.LIVE_SIDE,
            tier="side",
            before="Chad",
            after="Australia",
            probe={"p": 1},
        )
        moved = store.change_state(
            fact_id, FactState.LIVE_WEIGHTS, tier="weights", generation=3, reason="age"
        )
    assert (moved.tier, moved.generation, moved.reason) == ("weights", 3, "age")
    assert (moved.before, moved.after, moved.probe) == ("Chad", "Australia", {"p": 1})
    assert moved.changed_at > moved.received_at
    assert store.find_fact(fact_id) == moved
    with store.db.transaction():
        moved = store.change_state(fact_id, FactState.REVERTED)
    assert (moved.tier, moved.generation, moved.reason) == (None, None, None)
    assert [kind for kind, _ in events(store)] == [
        "fact_received",
        "fact_live-side",
        "fact_live-weights",
        "fact_reverted",
    ]
    with store.db.transaction():
        event = store.db.write_event("last", fact_id, note="n")
    assert event.data == {"note": "n"}
    assert event_log.verify_chain(store.db.conn, (event.seq, event.hash)).intact


def test_unknown_facts_and_tiers_are_errors(store: Store) -> None:
    with pytest.raises(KeditError, match="no fact nowhere"), store.db.transaction():
        store.change_state("nowhere", FactState.FAILED)
    fact_id = received(store)
    with pytest.raises(sqlite3.IntegrityError), store.db.transaction():
        store.change_state(fact_id, FactState.LIVE_SIDE, tier="attic")
    assert [f.state for f in store.list_facts()] == [FactState.RECEIVED]


def test_attempts_are_counted(store: Store) -> None:
    fact_id = received(store)
    with store.db.transaction():
        assert [store.count_attempt(fact_id) for _ in range(3)] == [1, 2, 3]


def test_a_file_is_taken_in_once(store: Store) -> None:
    assert not store.has_submission("w1")
    counts = {"accepted": 2, "failed": 1, "duplicates": 0}
    with store.db.transaction():
        store.add_submission("w1", "facts\udcff.jsonl", "00", **counts)
    assert store.has_submission("w1")
    with pytest.raises(sqlite3.IntegrityError), store.db.transaction():
        store.add_submission("w1", "facts.jsonl", "00", **counts)


def test_edits_are_kept(store: Store) -> None:
    fact_id = received(store)
    with store.db.transaction():
        store.add_edit(fact_id, "side", None, 1.5, "live", {"answer": "Australia"})
        store.add_edit(fact_id, "weights", 1, 2, "failed", None)
    rows = store.db.conn.execute("SELECT tier, seconds, probe FROM edits ORDER BY id").fetchall()
    assert rows == [("side", 1.5, '{"answer":"Australia"}'), ("weights", 2.0, None)]


def test_audits_are_kept_with_an_event_each(store: Store, path: Path) -> None:
    assert store.newest_audit_id() == 0
    figures = {"norm": {"h.1": 1.25}, "perplexity": float("nan")}
    with store.db.transaction():
        first = store.add_audit(0, "keep", {}, [], 0.5)
        second = store.add_audit(0, "revert", figures, ["perplexity"], 0.5)
    assert store.newest_audit_id() == second
    with closing(open_readonly(path)) as conn:
        older, newest = fetch_audits(conn, 5)
    assert (newest["id"], older["id"]) == (second, first)
    assert (newest["verdict"], newest["reasons"]) == ("revert", ["perplexity"])
    assert newest["figures"] == {"norm": {"h.1": 1.25}, "perplexity": "nan"}
    assert events(store) == [("audit", None)] * 2


def test_the_last_success_of_a_job_ignores_failures_and_unfinished_runs(store: Store) -> None:
    assert store.find_last_success("audit") is None
    with store.db.transaction():
        good = store.start_job("audit", "2026-01-01T00:00:00.000Z")
        store.finish_job(good, JOB_OK)
        began = store.db.conn.execute("SELECT started_at FROM job_run").fetchone()[0]
        store.finish_job(store.start_job("audit", "x"), "failed", "out of luck")
        store.finish_job(store.start_job("expire", "x"), JOB_OK)
        store.start_job("audit", "y")
    assert store.find_last_success("audit") == began


def test_a_run_that_never_finished_is_noted_as_interrupted(store: Store) -> None:
    with store.db.transaction():
        store.finish_job(store.start_job("audit", "x"), JOB_OK)
        store.start_job("audit", "y")
        store.interrupt_jobs()
    rows = store.db.conn.execute("SELECT outcome, finished_at IS NULL FROM job_run ORDER BY id")
    assert [tuple(row) for row in rows] == [(JOB_OK, 0), (JOB_INTERRUPTED, 1)]


def test_everything_is_there_after_a_restart(path: Path) -> None:
    with closing(Store(path, Clock())) as store:
        fact_id = received(store)
        stored = store.find_fact(fact_id)
    with closing(Store(path, lambda: datetime.now(UTC))) as store:
        assert store.find_fact(fact_id) == stored
        assert store.artifacts.get_generation(0).reason == "base"


@pytest.mark.parametrize("attempts", [0, 1, 2])
@pytest.mark.parametrize("direct", [True, False])
def test_a_fact_that_is_sent_beside_is_for_the_side_memory_now(
    store: Store, direct: bool, attempts: int
) -> None:
    with store.db.transaction():
        fact_id = store.receive_fact(EYRE, "a.jsonl", direct).id
        for _ in range(attempts):
            store.count_attempt(fact_id)
        store.send_to_side(fact_id, "weights_full", figure="perplexity", capacity=7, limit=0.1)
    stored = store.find_fact(fact_id)
    assert stored is not None
    # The side memory is where a direct fact goes after an odd number of attempts, and any other
    # after an even one.
    assert stored.direct is (attempts % 2 == 1)
    assert (stored.attempts, stored.state) == (attempts, FactState.RECEIVED)
    assert events(store)[-1] == ("weights_full", fact_id)
    (data,) = store.db.conn.execute("SELECT data FROM events ORDER BY seq DESC LIMIT 1").fetchone()
    assert json.loads(data) == {"figure": "perplexity", "capacity": 7, "limit": 0.1}
