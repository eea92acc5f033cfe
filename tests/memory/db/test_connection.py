import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest

from memory.db import event_log
from memory.db.store import Store
from memory.errors import KeditError
from memory.facts import Fact

EYRE = Fact("Lake Eyre", "{} lies in", "Australia")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "kedit.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with closing(Store(path, lambda: datetime.now(UTC))) as store:
        yield store


def events(store: Store) -> int:
    return event_log.verify_chain(store.db.conn, None).events


def test_the_connection_is_set_up_for_durability(store: Store) -> None:
    ask = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "recursive_triggers": 1}
    for name, value in ask.items():
        assert store.db.conn.execute(f"PRAGMA {name}").fetchone() == (value,)


def test_plugins_of_sqlite_utils_do_not_run(tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text("raise SystemExit('a plugin ran')")
    info = tmp_path / "planted-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: planted\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[sqlite_utils]\nplanted = planted\n")
    code = f"""
import sys
from datetime import UTC, datetime
from pathlib import Path
sys.path.insert(0, {str(tmp_path)!r})
from memory.db.store import Store
Store(Path({str(tmp_path / "kedit.db")!r}), lambda: datetime.now(UTC)).close()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_times_are_utc_and_sort_as_text(path: Path) -> None:
    moment = datetime(2026, 1, 1, 9, 0, 0, 5000, tzinfo=timezone(timedelta(hours=9)))
    with closing(Store(path, lambda: moment)) as store:
        assert store.db.format_now() == "2026-01-01T00:00:00.005Z"


def test_a_missing_folder_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(KeditError, match="no folder") as caught:
        Store(tmp_path / "none" / "kedit.db", lambda: datetime.now(UTC))
    assert caught.value.hint == "kedit-daemon init"


def test_a_transaction_that_fails_leaves_nothing(store: Store) -> None:
    with pytest.raises(KeyboardInterrupt), store.db.transaction():
        store.receive_fact(EYRE, "a.jsonl", False)
        store.db.set_meta("a", "b")
        raise KeyboardInterrupt
    assert (store.list_facts(), events(store), store.db.get_meta("a")) == ([], 0, None)


def test_a_broken_reference_fails_the_whole_transaction(store: Store) -> None:
    with pytest.raises(sqlite3.IntegrityError), store.db.transaction():
        store.db.set_meta("a", "b")
        store.artifacts.put_terms("unknown", b"x")
    assert store.db.get_meta("a") is None


def test_transactions_do_not_nest(store: Store) -> None:
    with (
        pytest.raises(KeditError, match="already open"),
        store.db.transaction(),
        store.db.transaction(),
    ):
        pass
    assert not store.db.conn.in_transaction


def test_no_other_writer_gets_into_a_transaction(store: Store, path: Path) -> None:
    with closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as other:
        with store.db.transaction():
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                other.execute("BEGIN IMMEDIATE")
            store.db.set_meta("a", "b")
        other.execute("BEGIN IMMEDIATE")


def test_writes_outside_a_transaction_are_refused(store: Store) -> None:
    with pytest.raises(KeditError, match="outside a transaction"):
        store.db.set_meta("a", "b")
    with pytest.raises(KeditError, match="outside a transaction"):
        store.receive_fact(EYRE, "a.jsonl", False)
    with pytest.raises(KeditError, match="outside a transaction"):
        store.db.write_event("x")
    assert store.list_facts() == []


@pytest.mark.parametrize(("last", "kept"), [("os._exit(9)", 1), ("", 2)])
def test_what_is_committed_survives_a_kill_and_nothing_else(
    path: Path, last: str, kept: int
) -> None:
    code = f"""
import os
from datetime import UTC, datetime
from pathlib import Path
from memory.facts import Fact
from memory.db.store import Store
store = Store(Path({str(path)!r}), lambda: datetime.now(UTC))
with store.db.transaction():
    store.receive_fact(Fact("a", "b", "c"), "f", False)
with store.db.transaction():
    store.receive_fact(Fact("d", "e", "f"), "f", False)
    {last}
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    with closing(Store(path, lambda: datetime.now(UTC))) as store:
        assert len(store.list_facts()) == kept
        assert event_log.verify_chain(store.db.conn, None).events == kept


def test_meta_is_set_changed_and_removed(store: Store) -> None:
    assert store.db.get_meta("paused") is None
    with store.db.transaction():
        store.db.set_meta("paused", "disk full")
        store.db.set_meta("paused", "by hand")
    assert store.db.get_meta("paused") == "by hand"
    with store.db.transaction():
        store.db.set_meta("paused", None)
    assert store.db.get_meta("paused") is None
