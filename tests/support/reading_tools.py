"""What the tests of reading share: a database with some of everything in it."""

from datetime import UTC, datetime

from memory.db.store import JOB_OK, Store
from memory.facts import Fact, FactState

TODAY = datetime(2026, 3, 2, 12, tzinfo=UTC)
FACTS = (
    Fact("Ärzte", "{} are from", "Berlin", external_id="band"),
    Fact("Lake Eyre", "{} lies in", "Australia", valid_until="2027-01-01"),
    Fact("Lake_Chad", "{} lies in", "Chad"),
    Fact("Oslo", "{} lies in", "Norway"),
)


class Days:
    """A clock that starts a day early; `to` sets it."""

    def __init__(self) -> None:
        self.to = datetime(2026, 3, 1, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.to


def fill(store: Store, clock: Days) -> list[str]:
    with store.db.transaction():
        ids = [store.receive_fact(fact, "a.jsonl", direct=True).id for fact in FACTS]
        store.change_state(ids[3], FactState.FAILED, reason="does not answer")
        store.add_submission("w0", "old.jsonl", "00", accepted=1, failed=4, duplicates=0)
    clock.to = TODAY
    with store.db.transaction():
        store.change_state(ids[0], FactState.LIVE_SIDE, tier="side", before="Köln", after="Berlin")
        store.change_state(ids[1], FactState.FAILED, reason="neighbours moved", probe={"ok": False})
        store.artifacts.put_side_keys(ids[0], 1, b"12345")
        store.artifacts.put_terms(ids[0], b"123")
        store.add_edit(ids[0], "side", None, 2.5, "live", {"ok": True})
        store.add_submission("w1", "a.jsonl", "00", accepted=4, failed=2, duplicates=0)
        store.add_submission("w2", "b.jsonl", "00", accepted=4, failed=0, duplicates=0)
        store.add_audit(0, "warn", {"norm": 1.2}, ["norm"], 1.0)
        store.finish_job(store.start_job("audit", "x"), "failed", "why")
        store.finish_job(store.start_job("audit", "y"), JOB_OK)
        store.start_job("expire", "z")
        for key, value in {"model": "tiny", "pid": "4121", "paused": "disk full"}.items():
            store.db.set_meta(key, value)
    return ids
