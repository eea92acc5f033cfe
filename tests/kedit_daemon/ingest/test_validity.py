"""A fact that is handed in again: with the same terms, with others, and with a time to begin."""

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from kedit_daemon.config import Config
from kedit_daemon.home import Home
from kedit_daemon.ingest.inbox import Inbox
from kedit_daemon.ingest.intake import Intake
from kedit_daemon.ingest.parser import parse_file
from kedit_daemon.ingest.schemas import FileLimits
from kedit_daemon.ingest.submit import predict_outcomes
from kedit_daemon.ingest.validity import begin_due_facts
from memory.db.store import Store
from memory.facts import Fact, FactState, fact_from_json, fact_to_json

ONE = {"subject": "country 1", "prompt": "The seat of {} is", "target": "Oslo"}
CAIRO = {**ONE, "target": "Cairo"}


class Desk:
    """An inbox and a store under a clock that a test moves."""

    def __init__(self, root: Path) -> None:
        self.home, self.now = Home(root), datetime(2026, 1, 1, tzinfo=UTC)
        self.home.create_folders()
        self.store = Store(self.home.database_file, lambda: self.now)
        self.inbox = Inbox(self.home.inbox_folder, 0.0, 1 << 20, lambda: self.now)
        self.intake = Intake(self.store, self.inbox, Config())
        self.files = 0

    def drop(self, *records: dict[str, Any]) -> list[tuple[str, str]]:
        """Take a file in; return what `submit` says of it before: outcome and detail."""
        data = "".join(json.dumps(record) + "\n" for record in records).encode()
        parsed = parse_file(data, "x.jsonl", None, FileLimits())
        now = self.now.isoformat().replace("+00:00", "Z")
        told = predict_outcomes([fact for _, fact in parsed.facts], self.home, now, 500)
        self.files += 1
        (self.home.inbox_folder / f"{self.files}.jsonl").write_bytes(data)
        self.now += timedelta(seconds=10)
        for claim in self.inbox.claim_files(float(self.files)):
            self.intake.take_file(claim)
        return [(one.outcome, one.detail) for one in told]

    def make_live(self, state: FactState = FactState.LIVE_SIDE) -> str:
        (fact,) = self.store.list_facts((FactState.RECEIVED,))
        with self.store.db.transaction():
            self.store.change_state(fact.id, state)
        return fact.id

    def states(self) -> list[tuple[str, str]]:
        return [(f.fact.target, str(f.state)) for f in self.store.list_facts()]

    def events(self, kind: str) -> list[dict[str, Any]]:
        sql = "SELECT data FROM events WHERE kind = ? ORDER BY seq"
        return [json.loads(data) for (data,) in self.store.db.conn.execute(sql, (kind,))]


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    made = Desk(tmp_path)
    yield made
    made.store.close()


TERMS: list[tuple[dict[str, Any], dict[str, Any], bool]] = [
    ({"valid_until": "2027-01-01"}, {"valid_until": "2028-01-01"}, False),
    ({"valid_until": "2027-01-01"}, {"valid_until": "2026-06-01"}, False),
    ({"valid_until": "2027-01-01"}, {}, False),
    ({}, {"valid_until": "2027-01-01T12:00:00+02:00"}, False),
    ({"tags": ["a"]}, {"tags": ["a", "verbatim"]}, False),
    ({"source": "a.pdf"}, {"source": "b.pdf"}, False),
    ({"source": "a.pdf"}, {}, False),
    ({"id": "mine-1"}, {"id": "mine-2"}, False),
    ({"valid_from": "2025-01-01"}, {"valid_from": "2025-06-01"}, False),
    ({"paraphrases": ["{} is governed from", "{}: seat"]},
     {"paraphrases": ["{}: seat", "{} is governed from"]}, False),
    ({}, {"paraphrases": ["{} is governed from"]}, True),
    ({"paraphrases": ["{} is governed from"]}, {}, True),
    ({}, {"neighbours": [{"prompt": "The seat of Peru is", "answer": "Lima"}]}, True),
    ({"neighbours": [{"prompt": "Peru's seat:"}]},
     {"neighbours": [{"prompt": "Peru's seat:", "answer": "Lima"}]}, True),
    ({"aliases": ["C1"]}, {"aliases": ["C1", "C-1"]}, True),
    ({}, {"questions": ["Where does {} sit?"]}, True),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "relearned"), TERMS)
@pytest.mark.parametrize("state", ["received", "live-side", "live-weights"])
def test_other_terms_are_an_amendment(
    desk: Desk, before: dict[str, Any], after: dict[str, Any], relearned: bool, state: str
) -> None:
    assert desk.drop(ONE | before)[0][0] == "new"
    fact_id = desk.make_live(FactState(state))
    ((outcome, detail),) = desk.drop(ONE | after)
    (fact,) = desk.store.list_facts()
    assert (fact.id, str(fact.state), outcome) == (fact_id, state, "amended")
    (wanted,) = parse_file(json.dumps(ONE | after).encode(), "x.jsonl", None, FileLimits()).facts
    assert fact.fact == wanted[1]
    (event,) = desk.events("fact_amended")
    (name,) = event["changes"]
    assert detail == name and event["changes"][name]["before"] != event["changes"][name]["after"]
    assert desk.store.list_amended() == ([fact_id] if relearned else [])
    row = desk.store.db.fetch_one("SELECT external_id, valid_until FROM facts")
    assert row == (fact.fact.external_id, fact.fact.valid_until)
    assert desk.drop(ONE | after)[0][0] == "duplicate"
    assert len(desk.events("fact_duplicate")) == len(desk.events("fact_amended")) == 1
    (taken,) = [e for e in desk.events("file_taken") if e["amended"]]
    assert (taken["facts"], taken["duplicates"]) == (0, 0)


def test_of_two_records_in_one_file_the_later_holds(desk: Desk) -> None:
    told = desk.drop(ONE, ONE | {"tags": ["x"]}, ONE | {"tags": ["x"]}, CAIRO, ONE)
    names = [outcome for outcome, _ in told]
    assert names == ["new", "amended", "duplicate", "supersedes", "supersedes"]
    assert desk.states() == [("Cairo", "superseded"), ("Oslo", "received")]
    assert desk.store.list_facts((FactState.RECEIVED,))[0].fact.tags == ()


def test_a_deadline_that_has_passed_ends_a_known_fact_and_refuses_a_new_one(desk: Desk) -> None:
    over = {"valid_until": "2025-01-01"}
    assert desk.drop(CAIRO | over)[0][0] == "rejected"
    desk.drop(ONE)
    desk.make_live()
    assert desk.drop(ONE | over) == [("amended", "valid_until")]
    (fact,) = desk.store.list_facts((FactState.LIVE_SIDE,))
    assert fact.fact.valid_until == "2025-01-01T23:59:59Z"  # the job that expires facts finds it


def test_what_is_said_last_is_not_taken_for_known_while_another_waits(desk: Desk) -> None:
    desk.drop(ONE)
    desk.make_live()
    desk.drop(CAIRO)
    desk.drop(ONE)
    assert desk.states() == [("Oslo", "live-side"), ("Cairo", "superseded")]


def test_a_revived_fact_is_learned_from_its_new_texts(desk: Desk) -> None:
    desk.drop(ONE | {"source": "a"})
    fact_id = desk.make_live(FactState.REVERTED)
    assert desk.drop(ONE | {"source": "b", "aliases": ["C1"]})[0][0] == "new"
    (fact,) = desk.store.list_facts()
    assert (fact.id, fact.state, fact.fact.source) == (fact_id, FactState.RECEIVED, "b")
    assert desk.store.list_amended() == [fact_id]
    with desk.store.db.transaction():
        desk.store.unmark_amended([fact_id])
    assert desk.store.list_amended() == []


def test_a_fact_begins_with_its_valid_from_and_gives_way_only_then(desk: Desk) -> None:
    desk.drop(ONE)
    desk.make_live()
    later = CAIRO | {"valid_from": "2026-02-01"}
    assert desk.drop(later) == [("scheduled", "valid from 2026-02-01T00:00:00Z")]
    desk.drop(ONE | {"target": "Lima"})
    assert desk.states() == [("Oslo", "live-side"), ("Cairo", "scheduled"), ("Lima", "received")]
    with desk.store.db.transaction():
        assert begin_due_facts(desk.store) == 0
    desk.now = datetime(2026, 2, 1, 0, 0, 1, tzinfo=UTC)
    with desk.store.db.transaction():
        assert begin_due_facts(desk.store) == 1
    assert desk.states() == [("Oslo", "live-side"), ("Lima", "superseded"), ("Cairo", "received")]
    assert desk.events("fact_scheduled")[0]["reason"] == "valid from 2026-02-01T00:00:00Z"


def test_of_two_scheduled_facts_each_has_its_turn(desk: Desk) -> None:
    desk.drop(CAIRO | {"valid_from": "2026-03-01"}, ONE | {"valid_from": "2026-02-01"})
    desk.now = datetime(2026, 2, 2, tzinfo=UTC)
    with desk.store.db.transaction():
        begin_due_facts(desk.store)
    assert desk.states() == [("Cairo", "scheduled"), ("Oslo", "received")]
    desk.now = datetime(2026, 4, 1, tzinfo=UTC)
    with desk.store.db.transaction():
        begin_due_facts(desk.store)
    assert desk.states() == [("Oslo", "superseded"), ("Cairo", "received")]


def test_the_time_to_begin_can_be_amended(desk: Desk) -> None:
    desk.drop(ONE | {"valid_from": "2026-03-01"})
    assert desk.drop(ONE | {"valid_from": "2026-04-01"}) == [("amended", "valid_from")]
    assert desk.states() == [("Oslo", "scheduled")]
    desk.drop(ONE)
    assert desk.states() == [("Oslo", "received")]
    desk.drop(ONE | {"valid_from": "2026-03-01"})
    assert desk.states() == [("Oslo", "scheduled")]
    desk.drop(ONE)
    fact_id = desk.make_live()
    desk.drop(ONE | {"valid_from": "2026-03-01"})
    assert (desk.states(), desk.store.list_amended()) == ([("Oslo", "live-side")], [fact_id])


@pytest.mark.parametrize("day", ["2026-01-31", "20260131", "2026-W05-6"])
def test_a_day_as_deadline_means_its_end(day: str) -> None:
    data = json.dumps(ONE | {"valid_from": day, "valid_until": day}).encode()
    ((_, fact),) = parse_file(data, "x.jsonl", None, FileLimits()).facts
    assert fact.valid_from == "2026-01-31T00:00:00Z"
    assert fact.valid_until == "2026-01-31T23:59:59Z"
    ((_, last),) = parse_file(
        json.dumps(ONE | {"valid_until": "9999-12-31"}).encode(), "x.jsonl", None, FileLimits()
    ).facts
    assert last.valid_until == "9999-12-31T23:59:59Z"


def test_a_fact_of_an_older_version_keeps_its_id(desk: Desk) -> None:
    """Its source and `valid_from` are part of it; the record says nothing of that."""
    old = Fact(**ONE, source="a.pdf", hashed_terms=(None, "a.pdf"))
    record = json.loads(fact_to_json(old))
    del record["hashed_terms"]
    assert fact_from_json(json.dumps(record)) == old
    assert old.id == "9809cd65ac42" != Fact(**ONE).id
    with desk.store.db.transaction():
        desk.store.receive_fact(old, "a.jsonl", False)
        desk.store.db.execute_write("UPDATE facts SET record = ?", json.dumps(record))
    assert desk.drop(ONE | {"source": "a.pdf"}) == [("duplicate", "already received")]
    assert desk.drop(ONE | {"source": "b.pdf"}) == [("amended", "source")]
    (fact,) = desk.store.list_facts()
    assert (fact.id, fact.fact.source) == (old.id, "b.pdf")
