"""SQLite connections: one that reads, and the one that writes, in whole transactions."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from memory.db import event_log, schema
from memory.db.event_log import Event
from memory.errors import KeditError, NoHome
from memory.timestamps import format_utc


class ReadingConnection:
    """Read access to the database."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self.conn = conn

    def close(self) -> None:
        """Close the connection; committed data are safe without it, too."""
        self.conn.close()

    def get_meta(self, key: str) -> str | None:
        """Return the value of a key of `meta_keys`, or None."""
        row = self.fetch_one("SELECT value FROM meta WHERE key = ?", key)
        return row[0] if row else None

    def fetch_one(self, sql: str, *values: Any) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = self.conn.execute(sql, values).fetchone()
        return row


class WritingConnection(ReadingConnection):
    """The only connection that writes; it belongs to the thread that made it."""

    def __init__(self, path: Path, clock: Callable[[], datetime]) -> None:
        if not path.parent.is_dir():
            raise NoHome(f"there is no folder {path.parent}", hint="kedit-daemon init")
        self._clock = clock
        schema.check_file(path)
        with ExitStack() as undo:
            # Plugins of sqlite-utils are third-party code: none of it runs here.
            db = Database(path, execute_plugins=False, strict=True)
            undo.callback(db.close)
            schema.migrate_database(db, path)
            db.enable_wal()
            db.execute("PRAGMA synchronous=FULL")
            db.execute("PRAGMA foreign_keys=ON")
            undo.pop_all()
        super().__init__(db.conn)

    def format_now(self) -> str:
        """Return the clock's time as ISO-8601 in UTC, of one width, so that it sorts as text."""
        return format_utc(self._clock())

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all writes of the block or none, without another writer in between."""
        if self.conn.in_transaction:
            raise KeditError("a transaction is already open", code="nested-transaction")
        self.conn.execute("BEGIN IMMEDIATE")
        try:
            yield
            self.conn.execute("COMMIT")
        finally:
            # SQLite itself has rolled back after some errors, such as a full disk.
            if self.conn.in_transaction:
                self.conn.execute("ROLLBACK")

    def write_event(self, kind: str, fact_id: str | None = None, **data: Any) -> Event:
        """Append an event inside the open transaction."""
        return event_log.append_event(self.conn, self.format_now(), kind, fact_id, data)

    def set_meta(self, key: str, value: str | None) -> None:
        """Store the value of a key of `meta_keys`; None removes it."""
        if value is None:
            self.execute_write("DELETE FROM meta WHERE key = ?", key)
        else:
            self.upsert_row("meta", "key", {"key": key, "value": value})

    def execute_write(self, sql: str, *values: Any) -> sqlite3.Cursor:
        # Without an open transaction Python would begin one that nothing ever commits.
        if not self.conn.in_transaction:
            raise KeditError("a write outside a transaction", code="no-transaction")
        return self.conn.execute(sql, values)

    def insert_row(self, table: str, row: dict[str, Any]) -> int:
        names, marks = ", ".join(row), ", ".join("?" * len(row))
        done = self.execute_write(f"INSERT INTO {table}({names}) VALUES ({marks})", *row.values())
        return int(done.lastrowid or 0)

    def upsert_row(self, table: str, key: str, row: dict[str, Any]) -> None:
        names, marks = ", ".join(row), ", ".join("?" * len(row))
        changed = ", ".join(f"{n} = excluded.{n}" for n in row if n != key)
        self.execute_write(
            f"INSERT INTO {table}({names}) VALUES ({marks}) ON CONFLICT({key}) DO UPDATE "
            f"SET {changed}",
            *row.values(),
        )
