import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from sqlite_utils import Database

from memory.db import event_log, schema
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


def received(store: Store, fact: Fact = EYRE) -> str:
    with store.db.transaction():
        return store.receive_fact(fact, "a.jsonl", False).id


def test_tables_are_strict(store: Store) -> None:
    loose = store.db.conn.execute(
        "SELECT name FROM pragma_table_list WHERE schema = 'main' AND NOT strict"
        " AND name NOT LIKE 'sqlite_%' AND name <> '_sqlite_migrations'"
    ).fetchall()
    assert loose == []


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE events SET kind = 'x'",
        "DELETE FROM events",
        "INSERT OR REPLACE INTO events SELECT * FROM events",
    ],
)
@pytest.mark.parametrize("recursive", ["ON", "OFF"])
def test_events_are_append_only(store: Store, statement: str, recursive: str) -> None:
    received(store)
    store.db.conn.execute(f"PRAGMA recursive_triggers={recursive}")
    with pytest.raises(sqlite3.IntegrityError, match="append-only"), store.db.transaction():
        store.db.conn.execute(statement)
    assert event_log.verify_chain(store.db.conn, None).events == 1


@pytest.mark.parametrize("damage", ["page", "header", "cut"])
def test_a_damaged_database_is_refused(path: Path, damage: str) -> None:
    with closing(Store(path, lambda: datetime.now(UTC))) as store:
        for n in range(200):
            received(store, Fact(f"s{n}", "{} is", "x" * 100))
    data = bytearray(path.read_bytes())
    if damage == "page":
        data[8192:12288] = b"\xff" * 4096
    elif damage == "header":
        data[:16] = b"not a database!!"
    path.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    before = path.read_bytes()
    with pytest.raises(KeditError) as caught:
        Store(path, lambda: datetime.now(UTC))
    assert (caught.value.code, caught.value.exit_code) == ("damaged", 78)
    assert "kedit-daemon restore BACKUP --replace" in caught.value.hint
    assert path.read_bytes() == before


def test_what_a_crash_began_before_the_log_is_in_use_is_undone(path: Path) -> None:
    """As where it is just being made, or has just come out of a backup."""
    with closing(Store(path, lambda: datetime.now(UTC))) as store:
        received(store)
    with closing(sqlite3.connect(path)) as conn:
        conn.execute("PRAGMA journal_mode=DELETE")
        conn.execute("PRAGMA cache_size=1")
        conn.execute("BEGIN")
        conn.execute("CREATE TABLE half(x)")
        conn.executemany("INSERT INTO half VALUES (?)", [("x" * 5000,)] * 50)
        crashed = path.with_name("crashed.db")
        for ending in ("", "-journal"):  # both as they are in the middle of it
            shutil.copy(f"{path}{ending}", f"{crashed}{ending}")
        conn.execute("ROLLBACK")
    with closing(Store(crashed, lambda: datetime.now(UTC))) as store:
        assert [f.id for f in store.list_facts()] == [EYRE.id]
        assert (
            store.db.conn.execute("SELECT 1 FROM sqlite_master WHERE name = 'half'").fetchall()
            == []
        )


def m002_next(db: Database) -> None:
    db.execute("ALTER TABLE facts ADD COLUMN mood TEXT")


def m003_broken(db: Database) -> None:
    db.execute("ALTER TABLE facts ADD COLUMN weather TEXT")
    raise sqlite3.OperationalError("no such thing")


def columns(path: Path) -> set[str]:
    with closing(sqlite3.connect(path)) as conn:
        return {row[1] for row in conn.execute("PRAGMA table_info(facts)")}


def migrate(path: Path, *steps: schema.MigrationStep) -> None:
    with closing(Database(path, execute_plugins=False).conn) as conn:
        db = Database(conn, execute_plugins=False)
        schema.migrate_database(db, path, (*schema.MIGRATION_STEPS, *steps))


def test_a_new_database_needs_no_backup(store: Store, path: Path) -> None:
    assert list(path.parent.glob("*before*")) == []


def test_a_backup_is_kept_before_a_migration(path: Path) -> None:
    with closing(Store(path, lambda: datetime.now(UTC))) as store:
        fact_id = received(store)
    migrate(path, m002_next)
    assert "mood" in columns(path)
    backup = path.with_name("kedit.db.before-m002_next")
    assert "mood" not in columns(backup)
    with closing(Store(backup, lambda: datetime.now(UTC))) as store:
        assert store.find_fact(fact_id) is not None


def test_a_migration_that_fails_changes_nothing_and_can_be_tried_again(path: Path) -> None:
    Store(path, lambda: datetime.now(UTC)).close()
    for _ in range(2):
        with pytest.raises(sqlite3.OperationalError, match="no such thing"):
            migrate(path, m002_next, m003_broken)
        assert not {"mood", "weather"} & columns(path)
    migrate(path, m002_next)
    assert "mood" in columns(path)


def test_a_newer_database_is_refused_unchanged(path: Path) -> None:
    Store(path, lambda: datetime.now(UTC)).close()
    migrate(path, m002_next)
    before = path.read_bytes()
    with pytest.raises(KeditError, match="newer version: it has m002_next") as caught:
        Store(path, lambda: datetime.now(UTC))
    assert caught.value.exit_code == 78
    assert path.read_bytes() == before
