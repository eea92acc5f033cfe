import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from editing_home import Clock

from kedit_daemon.config import Config
from kedit_daemon.ingest.inbox import Claim, Inbox
from kedit_daemon.ingest.intake import Intake
from memory.db.store import Store
from memory.facts import Fact, FactState

ONE = {"subject": "country 1", "prompt": "The seat of {} is", "target": "Oslo"}
TWO = {"subject": "country 2", "prompt": "The seat of {} is", "target": "Lima"}


class Desk:
    """An inbox, a store, and what takes files from the one to the other."""

    def __init__(self, folder: Path, clock: Clock) -> None:
        config = Config.model_validate({"routing": {"direct_facts": 3}})
        self.folder, self.clock = folder, clock
        self.inbox = Inbox(folder / "inbox", 0.0, 10_000, clock)
        self.store = Store(folder / "kedit.db", clock)
        self.intake = Intake(self.store, self.inbox, config)
        self.monotonic = 0.0

    def claim(self, *records: Any, name: str = "facts.jsonl") -> Claim:
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        (self.folder / "inbox" / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        self.monotonic += 10
        self.clock.pass_time(seconds=10)
        (claim,) = self.inbox.claim_files(self.monotonic)
        return claim

    def drop(self, *records: Any, name: str = "facts.jsonl") -> None:
        self.intake.take_file(self.claim(*records, name=name))

    def states(self) -> list[tuple[str, str]]:
        return [(f.fact.target, str(f.state)) for f in self.store.list_facts()]

    def kinds(self) -> list[str]:
        return [kind for (kind,) in self.store.db.conn.execute("SELECT kind FROM events")]

    def names(self, folder: str) -> list[str]:
        return sorted(path.name for path in (self.folder / "inbox" / folder).iterdir())

    def submissions(self) -> list[tuple[int, int, int]]:
        rows = self.store.db.conn.execute("SELECT accepted, failed, duplicates FROM submissions")
        return [tuple(row) for row in rows]


@pytest.fixture
def desk(tmp_path: Path, clock: Clock) -> Iterator[Desk]:
    made = Desk(tmp_path, clock)
    yield made
    made.store.close()


def test_a_file_is_taken_in_one_transaction(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = desk.claim(ONE, TWO)

    def broken(*_: object, **__: object) -> None:
        raise OSError("a crash")

    with monkeypatch.context() as patch:
        patch.setattr(desk.store, "add_submission", broken)
        with pytest.raises(OSError, match="a crash"):
            desk.intake.take_file(claim)
    assert (desk.states(), desk.kinds(), desk.submissions()) == ([], [], [])
    (again,) = desk.inbox.pending_claims()
    desk.intake.take_file(again)
    assert desk.states() == [("Oslo", "received"), ("Lima", "received")]
    assert (desk.submissions(), desk.names("done")) == ([(2, 0, 0)], ["facts.jsonl"])


def test_a_file_that_comes_up_again_after_a_crash_adds_nothing(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = desk.claim(ONE, "nonsense")

    def broken(_claim: Claim) -> None:
        raise OSError("a crash")

    with monkeypatch.context() as patch:
        patch.setattr(desk.inbox, "finish_claim", broken)
        with pytest.raises(OSError, match="a crash"):
            desk.intake.take_file(claim)
    before = desk.kinds()
    (again,) = desk.inbox.pending_claims()
    desk.intake.take_file(again)
    assert (desk.kinds(), desk.submissions()) == (before, [(1, 1, 0)])
    assert desk.names("work") == []
    assert desk.names("done") == ["facts.jsonl"]
    assert desk.names("failed") == ["facts.jsonl", "facts.jsonl.error.json"]


def test_facts_that_are_known_are_counted_as_duplicates(desk: Desk) -> None:
    desk.drop(ONE, ONE)
    desk.drop(ONE, TWO)
    assert desk.states() == [("Oslo", "received"), ("Lima", "received")]
    assert desk.submissions() == [(1, 0, 1), (1, 0, 1)]
    assert desk.kinds().count("fact_duplicate") == 2


def test_a_fact_that_has_ended_may_come_again(desk: Desk) -> None:
    desk.drop(ONE)
    (one,) = desk.store.list_facts()
    with desk.store.db.transaction():
        desk.store.change_state(one.id, FactState.REVERTED, reason="by hand")
    desk.drop(ONE)
    assert desk.states() == [("Oslo", "received")]
    assert "fact_revived" in desk.kinds()


def test_a_later_fact_takes_the_place_of_one_that_waits(desk: Desk) -> None:
    newer = {**ONE, "target": "Cairo"}
    desk.drop(ONE)
    desk.drop(newer)
    assert desk.states() == [("Oslo", "superseded"), ("Cairo", "received")]
    desk.drop(TWO, {**TWO, "target": "Quito"})
    assert desk.states()[2:] == [("Lima", "superseded"), ("Quito", "received")]


def test_a_fact_whose_time_is_over_is_rejected_and_ends_nothing(desk: Desk) -> None:
    desk.drop(ONE)
    desk.drop({**ONE, "target": "Cairo", "valid_until": "2025-12-31T00:00:00Z"})
    assert desk.states() == [("Oslo", "received"), ("Cairo", "rejected")]
    reason = desk.store.list_facts((FactState.REJECTED,))[0].reason
    assert reason is not None and "has passed" in reason


def test_broken_records_end_in_failed_and_the_others_are_taken(desk: Desk) -> None:
    desk.drop(ONE, "{broken", {"subject": "x"}, name="mixed.jsonl")
    desk.drop("{broken", name="bad.jsonl")
    assert desk.states() == [("Oslo", "received")]
    assert desk.names("done") == ["mixed.jsonl"]
    report = json.loads((desk.folder / "inbox/failed/mixed.jsonl.error.json").read_text())
    assert [error["line"] for error in report["errors"]] == [2, 3]
    assert desk.names("failed") == [
        "bad.jsonl",
        "bad.jsonl.error.json",
        "mixed.jsonl",
        "mixed.jsonl.error.json",
    ]
    assert desk.kinds().count("record_failed") == 3


def test_many_facts_in_one_file_are_for_a_batch(desk: Desk) -> None:
    desk.drop(*({**ONE, "subject": f"country {n}"} for n in range(3)))
    desk.drop(ONE | {"subject": "country 9"}, name="b.jsonl")
    assert [f.direct for f in desk.store.list_facts()] == [True] * 3 + [False]
    assert desk.store.list_facts()[0].fact == Fact("country 0", ONE["prompt"], ONE["target"])
