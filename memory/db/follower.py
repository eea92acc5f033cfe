"""Read access for a process that follows the daemon's database and never writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from memory.db.artifact_reader import ArtifactReader, verify_blob
from memory.db.connection import ReadingConnection
from memory.db.queries import open_readonly
from memory.errors import KeditError
from memory.facts import LIVE_STATES, Fact, fact_from_json


@dataclass(frozen=True)
class LiveSideRow:
    """A fact of the side memory, with the sha256 of its retrieval keys and of its shard's file.
    Equal rows mean equal content."""

    fact_id: str
    keys_sha256: str
    shard_id: int
    file_sha256: str
    threshold: float


class Follower:
    """A connection that cannot write, for one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Raises NoHome or Unreadable when there is no database that can be read."""
        self.db = ReadingConnection(open_readonly(path, moves=True))
        self.artifacts = ArtifactReader(self.db)
        self._seen_version: int | None = None

    def close(self) -> None:
        """Close the connection."""
        self.db.close()

    def has_changed(self) -> bool:
        """Check for writes since the last call; True at the first."""
        before = self._seen_version
        self._seen_version = int(self.db.conn.execute("PRAGMA data_version").fetchone()[0])
        return before != self._seen_version

    def forget_version(self) -> None:
        """Make the next `has_changed` return True."""
        self._seen_version = None

    @contextmanager
    def read_snapshot(self) -> Iterator[None]:
        """Read the whole block from one snapshot of the database."""
        self.db.conn.execute("BEGIN")
        try:
            yield
        finally:
            self.db.conn.rollback()

    def has_generation(self, generation: int) -> bool:
        """Check that a generation with this number exists."""
        return self.db.fetch_one("SELECT 1 FROM generations WHERE id = ?", generation) is not None

    def list_live_rows(self) -> list[LiveSideRow]:
        """Return the rows of the side memory's facts, without their content."""
        rows = self.db.conn.execute(
            "SELECT k.fact_id, k.sha256, k.shard, s.sha256, s.threshold FROM side_keys k"
            " JOIN shards s ON s.id = k.shard JOIN facts f ON f.id = k.fact_id"
            " WHERE f.state IN (?, ?) ORDER BY k.fact_id",
            LIVE_STATES,
        )
        return [LiveSideRow(*row) for row in rows]

    def list_live_facts(self) -> list[str]:
        """Return the ids of the live facts, in either tier."""
        sql = "SELECT id FROM facts WHERE state IN (?, ?) ORDER BY seq"
        return [str(row[0]) for row in self.db.conn.execute(sql, LIVE_STATES)]

    def list_changed_facts(self, after: int) -> list[str]:
        """Return the ids of the facts that events behind a number are about."""
        sql = "SELECT DISTINCT fact_id FROM events WHERE seq > ? AND fact_id IS NOT NULL"
        return [str(row[0]) for row in self.db.conn.execute(sql, (after,))]

    def newest_event(self) -> int:
        """Return the number of the newest event."""
        return int(self.db.conn.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0])

    def find_live_fact(self, fact_id: str) -> Fact | None:
        """Return a fact if it is live, in either tier. Raises KeditError (code "corrupt") when its
        record is damaged."""
        sql = "SELECT record FROM facts WHERE id = ? AND state IN (?, ?)"
        row = self.db.fetch_one(sql, fact_id, *LIVE_STATES)
        try:
            return None if row is None else fact_from_json(row[0])
        except (ValueError, KeyError, TypeError) as error:
            hint = "kedit-daemon doctor"
            raise KeditError(f"fact {fact_id}: {error!r}", code="corrupt", hint=hint) from error

    def find_shard_file(self, fact_id: str) -> str | None:
        """Return the sha256 of the file of a fact's shard, if it has one."""
        sql = "SELECT s.sha256 FROM side_keys k JOIN shards s ON s.id = k.shard WHERE k.fact_id = ?"
        row = self.db.fetch_one(sql, fact_id)
        return None if row is None else str(row[0])

    def read_live_fact(self, fact_id: str) -> tuple[Fact, bytes]:
        """Return a fact of the side memory and its retrieval keys. Raises KeditError (code
        "corrupt") when they are damaged."""
        row = self.db.fetch_one(
            "SELECT f.record, k.sha256, k.tensors FROM side_keys k JOIN facts f ON f.id = k.fact_id"
            " WHERE f.id = ?",
            fact_id,
        )
        if row is None:
            raise KeditError(f"fact {fact_id} is not in the side memory", code="unknown-fact")
        record, sha, blob = row
        keys = verify_blob(sha, blob, f"the side keys of fact {fact_id}")
        return fact_from_json(record), keys
