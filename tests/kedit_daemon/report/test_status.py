import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from kedit_daemon.config import Config
from kedit_daemon.editing.fact_lifecycle import QUARANTINED
from kedit_daemon.home import Home
from kedit_daemon.ingest.failed_files import read_failed_report
from kedit_daemon.report.status import DEFAULT_SCHEDULE, choose_exit_code, gather_status
from kedit_daemon.system import lock
from memory.db import meta_keys
from memory.db.store import Store
from memory.errors import KeditError
from memory.facts import Fact, FactState

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.create_folders()
    home.config_file.write_text("[schedule]\naudit = '30 * * * *'\n")
    return home


@contextmanager
def opened(home: Home, now: datetime = NOW) -> Iterator[Store]:
    store = Store(home.database_file, lambda: now)
    try:
        with store.db.transaction():
            yield store
    finally:
        store.close()


def fact(n: int, target: str = "Australia") -> Fact:
    return Fact(f"Lake {n}", "The country that {} lies in is", target)


def found(home: Home, now: datetime = NOW) -> dict[str, object]:
    return gather_status(home, now, {}, "kedit-daemon")


def messages(home: Home) -> list[tuple[str, str, bool]]:
    warnings = gather_status(home, NOW, {}, "kedit-daemon")["warnings"]
    return [(w["message"], w["command"], w["attention"]) for w in warnings]


def test_the_defaults_are_those_of_the_settings() -> None:
    assert Config().schedule.model_dump() == DEFAULT_SCHEDULE


def test_a_folder_that_is_no_home(tmp_path: Path) -> None:
    seen = found(Home(tmp_path / "none"))
    assert choose_exit_code(seen) == 3
    assert seen["warnings"] == [
        {
            "message": f"there is no home {tmp_path / 'none'}",
            "command": "kedit-daemon init",
            "attention": False,
        }
    ]


def test_a_home_that_has_never_run(home: Home) -> None:
    seen = found(home)
    assert (seen["state"], seen["pid"], choose_exit_code(seen)) == ("stopped", None, 3)
    assert messages(home)[0][:2] == ("the daemon is not running", "kedit-daemon run")


def test_both_kinds_of_status_have_the_same_keys(home: Home) -> None:
    before = set(found(home))
    with opened(home) as store:
        store.receive_fact(fact(1), "a.jsonl", False)
    assert set(found(home)) == before


def test_a_healthy_daemon(home: Home) -> None:
    yesterday = NOW - timedelta(days=1)
    with opened(home, yesterday) as store:
        store.receive_fact(fact(1), "a.jsonl", False)
        store.change_state(fact(1).id, FactState.LIVE_SIDE, tier="side")
    with opened(home) as store:
        store.db.set_meta("started_at", "2026-03-01T10:00:00.000Z")
        store.db.set_meta("pid", str(os.getpid()))
        for n in (2, 3):
            store.receive_fact(fact(n), "b.jsonl", False)
            store.change_state(fact(n).id, FactState.LIVE_SIDE, tier="side")
        # A fact that moves on to the weights does not become live once more.
        store.change_state(fact(1).id, FactState.LIVE_WEIGHTS, tier="weights", generation=1)
        store.add_audit(0, "keep", {"norm_ratio": {"4": 1.01}}, [], 0.1)
        run = store.start_job("consolidate", "2026-03-01T04:00:00Z")
        store.finish_job(run, "ok")
    with lock.hold_lock(home.lock_file):
        seen = gather_status(home, NOW, {}, "kedit-daemon")
    assert choose_exit_code(seen) == 0
    assert seen["warnings"] == []
    assert seen["state"] == "running"
    assert seen["since"] == "2026-03-01T10:00:00.000Z"
    assert seen["applied_today"] == 2
    assert seen["facts"]["live-side"] == 2
    assert seen["last_audit"]["figures"] == {"norm_ratio": {"4": 1.01}}
    assert seen["jobs"]["consolidate"]["outcome"] == "ok"
    assert seen["jobs"]["audit"]["next"] == "2026-03-01T12:30:00Z"


def test_the_environment_s_schedule_counts(home: Home) -> None:
    environ = {"KEDIT_SCHEDULE_AUDIT": "45 * * * *"}
    with lock.hold_lock(home.lock_file):
        seen = gather_status(home, NOW, environ, "kedit-daemon")
    assert seen["jobs"]["audit"]["next"] == "2026-03-01T12:45:00Z"


@pytest.mark.parametrize("text", ["schedule = 3\n", "not toml", "\xff"])
def test_a_broken_file_of_settings_does_not_stop_status(home: Home, text: str) -> None:
    home.config_file.write_bytes(text.encode("latin-1"))
    with lock.hold_lock(home.lock_file):
        assert gather_status(home, NOW, {}, "x")["jobs"]["audit"]["next"] == "2026-03-01T13:00:00Z"


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        (FactState.FAILED, "does not answer"),
        (FactState.REVERTED, f"{QUARANTINED}: it makes the weights unhealthy"),
    ],
)
def test_a_failed_fact_needs_a_person_until_a_later_one_takes_its_place(
    home: Home, state: FactState, reason: str
) -> None:
    with opened(home) as store:
        store.receive_fact(fact(1), "a.jsonl", False)
        store.receive_fact(fact(2), "a.jsonl", False)
        store.change_state(fact(1).id, state, reason=reason)
        store.change_state(fact(2).id, FactState.REVERTED, reason="reverted by hand")
    with lock.hold_lock(home.lock_file):
        assert choose_exit_code(found(home)) == 4
        told = (f"1 fact has failed: {reason}", f"kedit-daemon show {fact(1).id}", True)
        assert messages(home) == [told]
        with opened(home) as store:
            store.receive_fact(fact(1, "Chad"), "b.jsonl", False)
        assert choose_exit_code(found(home)) == 0


def test_a_failed_file_needs_a_person(home: Home) -> None:
    report = {"claim": "x", "file": "f.jsonl", "at": "2026-03-01T00:00:00Z"}
    errors = [{"line": 3, "problem": "target is empty", "remedy": "fill it in", "record": "{}"}]
    path = home.inbox_folder / "failed" / "f.jsonl.error.json"
    path.write_text(json.dumps({**report, "errors": errors}, indent=1))
    (home.inbox_folder / "failed" / "f.jsonl").write_text("{}")
    with lock.hold_lock(home.lock_file):
        told = "1 file in failed/: f.jsonl line 3: target is empty"
        assert messages(home) == [(told, "kedit-daemon show f.jsonl", True)]
        assert choose_exit_code(found(home)) == 4
        path.write_text("{")
        assert messages(home)[0][0] == "1 file in failed/: f.jsonl"
        path.unlink()
        assert choose_exit_code(found(home)) == 0


def test_a_name_never_leads_out_of_the_folder(home: Home) -> None:
    (home.inbox_folder / "secret.error.json").write_text('{"errors": []}')
    assert read_failed_report(home, "../secret") is None


@pytest.mark.parametrize(
    ("verdict", "command", "code"),
    [("warn", "log --kind audit", 0), ("consolidate", "consolidate", 0), ("revert", "audit", 4)],
)
def test_verdicts(home: Home, verdict: str, command: str, code: int) -> None:
    with opened(home) as store:
        store.add_audit(0, verdict, {}, ["norm of layer 4 is 1.7 of the base"], 0.1)
    with lock.hold_lock(home.lock_file):
        told = f"the last audit says {verdict}: norm of layer 4 is 1.7 of the base"
        assert messages(home) == [(told, f"kedit-daemon {command}", code == 4)]
        assert choose_exit_code(found(home)) == code


def test_a_paused_daemon_needs_a_person(home: Home) -> None:
    with opened(home) as store:
        store.db.set_meta("paused", "disk full")
        store.db.set_meta("pid", str(os.getpid()))
    assert found(home)["state"] == "stopped"
    with lock.hold_lock(home.lock_file):
        seen = found(home)
        assert (seen["state"], choose_exit_code(seen)) == ("paused", 4)


def test_a_daemon_that_starts_is_not_taken_for_the_one_before(home: Home) -> None:
    with opened(home) as store:
        store.db.set_meta("pid", "1")
        store.db.set_meta("started_at", "2026-03-01T10:00:00.000Z")
        store.db.set_meta("paused", "disk full")
    with lock.hold_lock(home.lock_file):
        seen = found(home)
    assert (seen["state"], seen["since"], seen["pid"]) == ("starting", None, os.getpid())
    assert choose_exit_code(seen) == 0


def test_flushes_that_are_held_back_need_a_person(home: Home) -> None:
    with opened(home) as store:
        store.db.set_meta(meta_keys.FLUSH_HELD, "norm of layer 4 is 1.7 of the base")
    with lock.hold_lock(home.lock_file):
        told = "flushes are held back: norm of layer 4 is 1.7 of the base"
        assert messages(home) == [(told, "kedit-daemon consolidate", True)]


def test_publishing_that_failed_needs_a_person_until_it_succeeds(home: Home) -> None:
    why = "error[rank]: the adapter would have the rank 600"
    with opened(home) as store:
        store.db.set_meta(meta_keys.PUBLISH_FAILED, why)
    with lock.hold_lock(home.lock_file):
        told = f"publishing has failed: {why}"
        assert messages(home) == [(told, "kedit-daemon log --kind publish_failed --limit 1", True)]
        assert found(home)["publish_failed"] == why
        with opened(home) as store:
            store.db.set_meta(meta_keys.PUBLISH_FAILED, None)
        assert choose_exit_code(found(home)) == 0


def test_jobs_that_failed_and_facts_that_wait(home: Home) -> None:
    with opened(home, NOW - timedelta(hours=1)) as store:
        store.receive_fact(fact(1), "a.jsonl", False)
        for name in ("audit", "expire"):
            store.finish_job(store.start_job(name, "2026-03-01T11:00:00Z"), "failed", "no disk")
    with lock.hold_lock(home.lock_file):
        assert messages(home) == [
            ("a fact has waited for 60 minutes", "kedit-daemon facts --state received", False),
            ("the last audit ended as failed: no disk", "kedit-daemon audit", True),
            ("the last expire ended as failed: no disk", "kedit-daemon doctor", False),
        ]
        assert found(home)["pending"] == {
            "count": 1,
            "oldest_received_at": "2026-03-01T11:00:00.000Z",
            "oldest_seconds": 3600.0,
        }


def test_a_file_that_is_no_database(home: Home) -> None:
    home.database_file.write_bytes(b"not a database, and long enough to have a header" * 9)
    with pytest.raises(KeditError, match="cannot be read"):
        found(home)


def test_what_the_weights_bear_is_told_once_it_is_known(home: Home) -> None:
    with opened(home) as store:
        store.receive_fact(fact(1), "a.jsonl", False)
        store.change_state(fact(1).id, FactState.LIVE_WEIGHTS, tier="weights", generation=1)
    seen = found(home)
    keys = ("weights_facts", "weights_capacity", "weights_limit")
    assert [seen[key] for key in keys] == [1, None, None]
    with opened(home) as store:
        store.db.set_meta(meta_keys.WEIGHTS_CAPACITY, "170")
        store.db.set_meta(meta_keys.WEIGHTS_LIMIT, "norm of layer 2")
    seen = found(home)
    assert [seen[key] for key in keys] == [1, 170, "norm of layer 2"]


def test_full_weights_are_told_and_need_nobody(home: Home) -> None:
    with opened(home) as store:
        for n in range(3):
            store.receive_fact(fact(n), "a.jsonl", False)
        store.change_state(fact(0).id, FactState.LIVE_WEIGHTS, tier="weights", generation=1)
        store.db.set_meta(meta_keys.WEIGHTS_CAPACITY, "1")
    with lock.hold_lock(home.lock_file):
        assert messages(home) == []  # nothing stays beside
        for n, told in ((1, "1 fact stays"), (2, "2 facts stay")):
            with opened(home) as store:
                store.change_state(fact(n).id, FactState.LIVE_SIDE, tier="side")
            text = f"weights full: {told} in the side memory"
            assert messages(home) == [(text, "kedit-daemon facts --state live-side", False)]
        assert choose_exit_code(found(home)) == 0
        with opened(home) as store:
            store.db.set_meta(meta_keys.WEIGHTS_CAPACITY, "2")
        assert messages(home) == []


def test_flushes_tell_what_they_cost_and_a_fact_in_them(home: Home) -> None:
    with opened(home) as store:
        for n in range(6):
            store.receive_fact(fact(n), "a.jsonl", False)
        store.add_edit(fact(0).id, "weights", 1, 5.5, "live", None)
        store.add_edit(fact(0).id, "side", None, 9.0, "live", None)
        store.add_edit(fact(0).id, "weights", 2, 9.0, "failed", None)
    assert found(home)["flush_cost"] is None  # one size tells no two costs apart
    with opened(home) as store:
        for n in range(1, 6):
            store.add_edit(fact(n).id, "weights", 2, 1.5, "live", None)
    assert found(home)["flush_cost"] == pytest.approx(
        {"flushes": 2, "per_batch": 5.0, "per_fact": 0.5}
    )


def test_what_nobody_can_do_anything_about_needs_nobody(home: Home) -> None:
    over = Fact("Lake 9", "{} lies in", "Chad", valid_until="2026-02-01T00:00:00Z")
    with opened(home) as store:
        store.receive_fact(over, "a.jsonl", False)
        store.change_state(over.id, FactState.FAILED, reason="does not answer")
    failed = home.inbox_folder / "failed"
    (failed / "a.jsonl.error.json").write_text('{"errors": []}')  # its file has been removed
    (failed / "empty.jsonl.error.json").write_text('{"errors": []}')
    (failed / "empty.jsonl").touch()
    with lock.hold_lock(home.lock_file):
        told = ("2 files in failed/: a.jsonl", "kedit-daemon show a.jsonl", False)
        assert messages(home) == [told] and choose_exit_code(found(home)) == 0
        (failed / "z.jsonl.error.json").write_text('{"errors": []}')
        (failed / "z.jsonl").write_text("{}")
        assert messages(home)[0][:2] == ("3 files in failed/: z.jsonl", "kedit-daemon show z.jsonl")
        assert choose_exit_code(found(home)) == 4
