"""Tables, migrations of a database of an earlier version, and integrity checks."""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Protocol

from sqlite_utils import Database, Migrations

from memory.errors import Damaged, KeditError
from memory.files import move_into_place


class MigrationStep(Protocol):
    """A migration; the database remembers it by its name."""

    __name__: str

    def __call__(self, db: Database, /) -> None: ...


_FACT_TABLES = (
    """CREATE TABLE submissions(
        work_name TEXT PRIMARY KEY, file_name TEXT NOT NULL, sha256 TEXT NOT NULL,
        received_at TEXT NOT NULL, accepted INT NOT NULL, failed INT NOT NULL,
        duplicates INT NOT NULL) STRICT""",
    """CREATE TABLE facts(
        id TEXT PRIMARY KEY, seq INT NOT NULL, slot TEXT NOT NULL, subject TEXT NOT NULL,
        prompt TEXT NOT NULL, target TEXT NOT NULL, record TEXT NOT NULL, state TEXT NOT NULL,
        tier TEXT CHECK (tier IN ('side', 'weights')), generation INT, direct INT NOT NULL,
        reason TEXT, file_name TEXT NOT NULL, received_at TEXT NOT NULL,
        changed_at TEXT NOT NULL, attempts INT NOT NULL DEFAULT 0, external_id TEXT,
        valid_until TEXT, before TEXT, after TEXT, probe TEXT) STRICT""",
    "CREATE UNIQUE INDEX facts_seq ON facts(seq)",
    "CREATE INDEX facts_state ON facts(state)",
    "CREATE INDEX facts_slot ON facts(slot)",
    "CREATE INDEX facts_external_id ON facts(external_id)",
    """CREATE TABLE edits(
        id INTEGER PRIMARY KEY, fact_id TEXT NOT NULL REFERENCES facts(id), tier TEXT NOT NULL,
        generation INT, at TEXT NOT NULL, seconds REAL NOT NULL, outcome TEXT NOT NULL,
        probe TEXT) STRICT""",
    "CREATE INDEX edits_fact_id ON edits(fact_id)",
)
_ARTIFACT_TABLES = (
    """CREATE TABLE terms(
        fact_id TEXT PRIMARY KEY REFERENCES facts(id), sha256 TEXT NOT NULL,
        tensors BLOB NOT NULL) STRICT""",
    """CREATE TABLE side_keys(
        fact_id TEXT PRIMARY KEY REFERENCES facts(id), shard INT NOT NULL,
        sha256 TEXT NOT NULL, tensors BLOB NOT NULL) STRICT""",
    """CREATE TABLE shards(
        id INTEGER PRIMARY KEY, sha256 TEXT NOT NULL, facts INT NOT NULL,
        threshold REAL NOT NULL, created_at TEXT NOT NULL) STRICT""",
    """CREATE TABLE generations(
        id INTEGER PRIMARY KEY, sha256 TEXT, weights_hash TEXT NOT NULL,
        parent INT REFERENCES generations(id), reason TEXT NOT NULL, fact_ids TEXT NOT NULL,
        figures TEXT NOT NULL, created_at TEXT NOT NULL) STRICT""",
)
_RUN_TABLES = (
    """CREATE TABLE audits(
        id INTEGER PRIMARY KEY, at TEXT NOT NULL, generation INT NOT NULL,
        verdict TEXT NOT NULL, figures TEXT NOT NULL, reasons TEXT NOT NULL,
        seconds REAL NOT NULL) STRICT""",
    """CREATE TABLE job_run(
        id INTEGER PRIMARY KEY, name TEXT NOT NULL, scheduled_for TEXT NOT NULL,
        started_at TEXT NOT NULL, finished_at TEXT, outcome TEXT, detail TEXT) STRICT""",
    "CREATE INDEX job_run_name ON job_run(name)",
    "CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
)
_EVENT_TABLES = (
    """CREATE TABLE events(
        seq INTEGER PRIMARY KEY, at TEXT NOT NULL, kind TEXT NOT NULL, fact_id TEXT,
        data TEXT NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL) STRICT""",
    "CREATE INDEX events_fact_id ON events(fact_id)",
    """CREATE TRIGGER events_no_update BEFORE UPDATE ON events
        BEGIN SELECT RAISE(ABORT, 'events are append-only'); END""",
    """CREATE TRIGGER events_no_delete BEFORE DELETE ON events
        BEGIN SELECT RAISE(ABORT, 'events are append-only'); END""",
    # REPLACE fires delete triggers only with recursive_triggers on, which the writer decides.
    """CREATE TRIGGER events_no_replace BEFORE INSERT ON events
        WHEN EXISTS (SELECT 1 FROM events WHERE seq = NEW.seq)
        BEGIN SELECT RAISE(ABORT, 'events are append-only'); END""",
)


def m001_first(db: Database) -> None:
    """Create the tables of the first version."""
    for statement in (*_FACT_TABLES, *_ARTIFACT_TABLES, *_RUN_TABLES, *_EVENT_TABLES):
        db.execute(statement)


MIGRATION_STEPS: tuple[MigrationStep, ...] = (m001_first,)
_MIGRATION_SET = "kedit"  # the name under which the database remembers its migrations


def check_file(path: Path, *, thorough: bool = False) -> None:
    """Refuse a database that is damaged or of a newer version, and leave it and its log unchanged:
    a connection that can write moves the log into the file, at the latest when it is closed."""
    if not path.is_file():
        return
    # A journal is left by a crash before the log was in use: only a connection that can write rolls
    # it back, and nobody can read before.
    mode = "rw" if path.with_name(f"{path.name}-journal").is_file() else "ro"
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True)) as conn:
        check_integrity(conn, path, thorough=thorough)
        refuse_newer(conn, path)


def migrate_database(
    db: Database, path: Path, steps: tuple[MigrationStep, ...] = MIGRATION_STEPS
) -> None:
    """Apply pending migrations, after a copy of the file was made."""
    migrations = Migrations(_MIGRATION_SET)
    for step in steps:
        migrations(name=step.__name__)(step)
    pending = migrations.pending(db)
    if pending and db.table_names():
        _back_up_database(db.conn, path.with_name(f"{path.name}.before-{pending[0].name}"))
    if pending:
        _apply_migrations(db, migrations)


def _apply_migrations(db: Database, migrations: Migrations) -> None:
    # apply() opens deferred transactions, which another writer can interleave with; inside this
    # one they become savepoints, and all steps are done or none.
    db.execute("BEGIN IMMEDIATE")
    try:
        migrations.apply(db)
        db.execute("COMMIT")
    finally:
        if db.conn.in_transaction:
            db.execute("ROLLBACK")


def refuse_newer(conn: sqlite3.Connection, path: Path) -> None:
    """Refuse a database with migrations that this version does not know."""
    table = Migrations.migrations_table
    if conn.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (table,)).fetchone() is None:
        return
    rows = conn.execute(f"SELECT name FROM {table} WHERE migration_set = ?", (_MIGRATION_SET,))
    unknown = {row[0] for row in rows} - {step.__name__ for step in MIGRATION_STEPS}
    if unknown:
        raise KeditError(
            f"{path} was written by a newer version: it has {', '.join(sorted(unknown))}",
            code="newer-database",
            hint=f"install that version again, or put back a backup ({path.name}.before-…)",
        )


def check_integrity(conn: sqlite3.Connection, path: Path, *, thorough: bool = False) -> None:
    """Raise Damaged for a damaged database. `thorough`: also when an index disagrees with its
    table."""
    pragma = "integrity_check" if thorough else "quick_check"
    try:
        problems = [row[0] for row in conn.execute(f"PRAGMA {pragma}(3)")]
    except sqlite3.OperationalError:
        raise  # a lock or an I/O error tells nothing about the content
    except sqlite3.DatabaseError as error:
        problems = [str(error)]
    if problems != ["ok"]:
        raise Damaged(str(path), "; ".join(problems))


def _back_up_database(conn: sqlite3.Connection, copy: Path) -> None:
    staged = copy.with_name(f".{copy.name}.tmp")
    staged.unlink(missing_ok=True)
    conn.execute("VACUUM INTO ?", (str(staged),))
    move_into_place(staged, copy)
