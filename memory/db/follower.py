"""The store as one sees it who follows a daemon from another process, and never writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from memory.db.artifact_reader import ArtifactReader, verify_blob
from memory.db.connection import ReadingConnection
from memory.db.queries import open_readonly
from memory.errors import KeditError
from memory.facts import Fact, FactState, fact_from_json


@dataclass(frozen=True)
class LiveSideRow:
    """A fact of the side memory: its shard, and by their sha256 the shard's file and the fact's
    retrieval keys. Two that are equal say the same."""

    fact_id: str
    keys_sha256: str
    shard_id: int
    file_sha256: str
    threshold: float


class Follower:
    """A connection that cannot write, for one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Raises KeditError: there is no database, or none that can be read."""
        self.db = ReadingConnection(open_readonly(path, moves=True))
        self.artifacts = ArtifactReader(self.db)
        self._seen_version: int | None = None

    def close(self) -> None:
        """Close the connection."""
        self.db.close()

    def has_changed(self) -> bool:
        """Whether anyone has written since this was last asked; at first, yes."""
        before = self._seen_version
        self._seen_version = int(self.db.conn.execute("PRAGMA data_version").fetchone()[0])
        return before != self._seen_version

    def forget_version(self) -> None:
        """Let what was seen last count as not seen."""
        self._seen_version = None

    @contextmanager
    def read_snapshot(self) -> Iterator[None]:
        """One moment of the database for all that is read in the block."""
        self.db.conn.execute("BEGIN")
        try:
            yield
        finally:
            self.db.conn.rollback()

    def has_generation(self, generation: int) -> bool:
        """Whether there is a generation with this number."""
        return self.db.fetch_one("SELECT 1 FROM generations WHERE id = ?", generation) is not None

    def list_live_rows(self) -> list[LiveSideRow]:
        """What the side memory holds: cheap beside reading it."""
        rows = self.db.conn.execute(
            "SELECT k.fact_id, k.sha256, k.shard, s.sha256, s.threshold FROM side_keys k"
            " JOIN shards s ON s.id = k.shard JOIN facts f ON f.id = k.fact_id"
            " WHERE f.state = ? ORDER BY k.fact_id",
            (FactState.LIVE_SIDE,),
        )
        return [LiveSideRow(*row) for row in rows]

    def read_live_fact(self, fact_id: str) -> tuple[Fact, bytes]:
        """A fact of the side memory, and its retrieval keys. Raises KeditError: they are
        damaged."""
        row = self.db.fetch_one(
            "SELECT f.record, k.sha256, k.tensors FROM side_keys k JOIN facts f ON f.id = k.fact_id"
            " WHERE f.id = ?",
            fact_id,
        )
        if row is None:
            raise KeditError(f"fact {fact_id} is not in the side memory", code="unknown-fact")
        return fact_from_json(row[0]), verify_blob(
            row[1], row[2], f"the side keys of fact {fact_id}"
        )
