"""The store as one sees it who follows a daemon from another process, and never writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from memory.db.derived import Derived, opened
from memory.db.queries import open_readonly
from memory.errors import KeditError
from memory.facts import Fact, State, from_json


@dataclass(frozen=True)
class LiveRow:
    """A fact of the side memory: its shard, and by their sha256 the shard's file and the fact's
    retrieval keys. Two that are equal say the same."""

    fact_id: str
    keys: str
    shard: int
    file: str
    threshold: float


class Follower(Derived):
    """A connection that cannot write, for one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Raises KeditError: there is no database, or none that can be read."""
        self.conn = open_readonly(path, moves=True)
        self._version: int | None = None

    def changed(self) -> bool:
        """Whether anyone has written since this was last asked; at first, yes."""
        before = self._version
        self._version = int(self.conn.execute("PRAGMA data_version").fetchone()[0])
        return before != self._version

    def look_again(self) -> None:
        """Let what was seen last count as not seen."""
        self._version = None

    @contextmanager
    def moment(self) -> Iterator[None]:
        """One moment of the database for all that is read in the block."""
        self.conn.execute("BEGIN")
        try:
            yield
        finally:
            self.conn.rollback()

    def known(self, generation: int) -> bool:
        """Whether there is a generation with this number."""
        return self._one("SELECT 1 FROM generations WHERE id = ?", generation) is not None

    def live_rows(self) -> list[LiveRow]:
        """What the side memory holds: cheap beside reading it."""
        rows = self.conn.execute(
            "SELECT k.fact_id, k.sha256, k.shard, s.sha256, s.threshold FROM side_keys k"
            " JOIN shards s ON s.id = k.shard JOIN facts f ON f.id = k.fact_id"
            " WHERE f.state = ? ORDER BY k.fact_id",
            (State.LIVE_SIDE,),
        )
        return [LiveRow(*row) for row in rows]

    def live(self, fact_id: str) -> tuple[Fact, bytes]:
        """A fact of the side memory, and its retrieval keys. Raises KeditError: they are
        damaged."""
        row = self._one(
            "SELECT f.record, k.sha256, k.tensors FROM side_keys k JOIN facts f ON f.id = k.fact_id"
            " WHERE f.id = ?",
            fact_id,
        )
        if row is None:
            raise KeditError(f"fact {fact_id} is not in the side memory", code="unknown-fact")
        return from_json(row[0]), opened(row[1], row[2], f"the side keys of fact {fact_id}")
