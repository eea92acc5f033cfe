"""One owner's id on several facts: told when they come in, and all are meant afterwards."""

import json
from collections.abc import Iterator
from contextlib import closing
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
from kedit_daemon.ingest.submit import find_shared_ids, foresee_submission
from memory.db.queries import (
    fetch_event_page,
    fetch_events,
    fetch_fact_detail,
    fetch_fact_details,
    open_readonly,
)
from memory.db.store import Store
from memory.facts import FactState


def fact(number: int, city: str = "Oslo", **more: Any) -> dict[str, Any]:
    return {
        "subject": f"country {number}",
        "prompt": "The seat of {} is",
        "target": city,
        "id": "emp-17",
        **more,
    }


class Office:
    """A home without a model."""

    def __init__(self, root: Path) -> None:
        self.home, self.now = Home(root), datetime(2026, 1, 1, tzinfo=UTC)
        self.home.create_folders()
        self.store = Store(self.home.database_file, lambda: self.now)
        self.inbox = Inbox(self.home.inbox_folder, 0.0, 1 << 20, lambda: self.now)
        self.intake = Intake(self.store, self.inbox, Config())

    def drop(self, *records: dict[str, Any]) -> dict[str, int]:
        """Take a file in; return what `submit` says of shared ids before."""
        data = "".join(json.dumps(record) + "\n" for record in records).encode()
        parsed = parse_file(data, "x.jsonl", None, FileLimits())
        told = find_shared_ids([one for _, one in parsed.facts], self.home)
        (self.home.inbox_folder / "a.jsonl").write_bytes(data)
        self.now += timedelta(seconds=10)
        (claim,) = self.inbox.claim_files(self.now.timestamp())
        self.intake.take_file(claim)
        return told

    def events(self) -> list[tuple[str, str]]:
        sql = "SELECT fact_id, json_extract(data, '$.other') FROM events WHERE kind = 'id_shared'"
        return [tuple(row) for row in self.store.db.conn.execute(sql)]


@pytest.fixture
def office(tmp_path: Path) -> Iterator[Office]:
    made = Office(tmp_path)
    yield made
    made.store.close()


def test_a_second_fact_with_an_id_is_told(office: Office) -> None:
    assert office.drop(fact(1)) == {}
    assert office.drop(fact(2)) == {"emp-17": 2}
    one, two = (f.id for f in office.store.list_facts())
    assert office.events() == [(two, one)]
    assert office.drop(fact(2)) == {"emp-17": 2}  # it is so still, and nothing new in the log
    assert office.drop(fact(3, id="other"), fact(4, id=None)) == {}
    assert len(office.events()) == 1
    assert office.drop(fact(3)) == {"emp-17": 3}  # amended: it has got the id
    assert len(office.events()) == 2


def test_facts_of_one_file_may_share_an_id_and_that_is_told_once(office: Office) -> None:
    assert office.drop(*(fact(n) for n in range(5))) == {"emp-17": 5}
    assert len(office.events()) == 1


def test_what_takes_the_place_of_a_fact_shares_nothing_with_it(office: Office) -> None:
    office.drop(fact(1))
    assert office.drop(fact(1, "Lima")) == {}
    (old, new) = office.store.list_facts()
    assert [f.id for f in office.store.find_facts("emp-17")] == [new.id]
    with office.store.db.transaction():
        office.store.change_state(new.id, FactState.REVERTED)
    assert office.drop(fact(2)) == {}
    assert office.events() == []
    assert [f.id for f in office.store.find_facts(old.id)] == [old.id]


def test_the_id_means_all_facts_that_have_not_ended(office: Office) -> None:
    office.drop(fact(1), fact(2), fact(3), fact(4, valid_from="2026-05-01"), fact(5, id="x"))
    first, *others = (f.id for f in office.store.list_facts())
    with office.store.db.transaction():
        office.store.change_state(first, FactState.REVERTED)
    meant = others[:3]
    assert [f.id for f in office.store.find_facts("emp-17")] == meant
    assert office.store.find_facts("nobody") == []
    with closing(open_readonly(office.home.database_file)) as conn:
        shown = fetch_fact_details(conn, "emp-17")
        assert sorted(f["id"] for f in shown) == sorted(meant)
        assert all(f["events"] for f in shown)
        newest = fetch_fact_detail(conn, "emp-17")
        assert newest is not None and newest["id"] == meant[-1]
        assert [f["id"] for f in fetch_fact_details(conn, first)] == [first]
        assert fetch_fact_details(conn, "nobody") == []
        seen = {event["fact_id"] for event in fetch_events(conn, fact="emp-17")}
        paged = {e["fact_id"] for e in fetch_event_page(conn, {"fact": "emp-17"}, None, 100)}
        assert seen == paged == {*meant}
    with office.store.db.transaction():
        for fact_id in meant:
            office.store.change_state(fact_id, FactState.EXPIRED)
    assert [f.id for f in office.store.find_facts("emp-17")] == [meant[-1]]


def test_what_cannot_be_read_stops_no_hand_in(office: Office) -> None:
    office.drop(fact(1))
    facts = [f.fact for f in office.store.list_facts()]
    office.store.close()
    now = "2026-01-01T00:00:00Z"
    assert foresee_submission(facts, office.home, now, 500)[0][0].outcome == "duplicate"
    for damage in (b"", b"no database" * 100):  # empty: as a daemon's first start leaves it shortly
        office.home.database_file.write_bytes(damage)
        for ending in ("-wal", "-shm"):
            Path(f"{office.home.database_file}{ending}").unlink(missing_ok=True)
        told, shared = foresee_submission(facts, office.home, now, 500)
        assert ([one.outcome for one in told], shared) == (["new"], {})
