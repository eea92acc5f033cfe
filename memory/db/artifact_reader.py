"""What editing has computed, read back, also by those who only follow a database."""

import hashlib
import json
from contextlib import suppress
from typing import Any

from memory.db import meta_keys
from memory.db.connection import ReadingConnection
from memory.db.rows import GENERATION_COLUMNS, SHARD_COLUMNS, GenerationRow, ShardRow, SideKeysRow
from memory.errors import Damaged, KeditError


class ArtifactReader:
    """Reads the artifacts of editing: terms, retrieval keys, shards, generations."""

    def __init__(self, db: ReadingConnection) -> None:
        self.db = db

    def read_terms(self, fact_id: str) -> bytes:
        """A fact's keys and targets, as they were put."""
        row = self.db.fetch_one("SELECT sha256, tensors FROM terms WHERE fact_id = ?", fact_id)
        if row is None:
            raise KeditError(f"fact {fact_id} has no terms for the weights", code="no-terms")
        return verify_blob(row[0], row[1], f"the terms of fact {fact_id}")

    def has_terms(self, fact_id: str) -> bool:
        """Whether a fact's keys and targets are kept."""
        return self.db.fetch_one("SELECT 1 FROM terms WHERE fact_id = ?", fact_id) is not None

    def find_any_terms(self) -> bytes | None:
        """Some fact's keys and targets, if any can be read."""
        for (fact_id,) in self.db.conn.execute("SELECT fact_id FROM terms"):
            with suppress(KeditError):
                return self.read_terms(fact_id)
        return None

    def read_side_keys(self) -> list[SideKeysRow]:
        """All retrieval keys that can be read, by shard: a damaged row must not hide the others."""
        rows = self.db.conn.execute(
            "SELECT fact_id, shard, sha256, tensors FROM side_keys ORDER BY shard, fact_id"
        )
        found = []
        for fact_id, shard, sha, blob in rows:
            with suppress(KeditError):
                keys = verify_blob(sha, blob, f"the side keys of fact {fact_id}")
                found.append(SideKeysRow(fact_id, shard, keys))
        return found

    def list_side_fact_ids(self) -> set[str]:
        """The facts that have retrieval keys, by id: cheap beside reading the keys."""
        return {fact_id for (fact_id,) in self.db.conn.execute("SELECT fact_id FROM side_keys")}

    def list_shards(self) -> list[ShardRow]:
        """All shards, oldest first."""
        rows = self.db.conn.execute(f"SELECT {SHARD_COLUMNS} FROM shards ORDER BY id")
        return [ShardRow(*row) for row in rows]

    def get_generation(self, number: int) -> GenerationRow:
        """One generation; 0 is the base."""
        row = self.db.fetch_one(
            f"SELECT {GENERATION_COLUMNS} FROM generations WHERE id = ?", number
        )
        if row is None:
            raise KeditError(f"there is no generation {number}", code="unknown-generation")
        return GenerationRow.from_row(row)

    def list_generations(self) -> list[GenerationRow]:
        """All generations, oldest first."""
        rows = self.db.conn.execute(f"SELECT {GENERATION_COLUMNS} FROM generations ORDER BY id")
        return [GenerationRow.from_row(row) for row in rows]

    def list_measurements(self, most: int = 100) -> list[tuple[int, dict[str, Any]]]:
        """Of the latest generations that hold facts: how many, and the figures; newest first."""
        rows = self.db.conn.execute(
            "SELECT json_array_length(fact_ids), figures FROM generations"
            " WHERE sha256 IS NOT NULL ORDER BY id DESC LIMIT ?",
            (most,),
        )
        return [(int(count), json.loads(figures)) for count, figures in rows]

    def active_generation(self) -> int:
        """The generation that is served."""
        return int(self.db.get_meta(meta_keys.ACTIVE_GENERATION) or 0)

    def check_active_generation(self) -> None:
        """Refuse a database whose active generation is not the one that was switched to last.
        Raises KeditError (78)."""
        said = self.db.fetch_one(
            "SELECT json_extract(data, '$.to') FROM events WHERE kind = 'generation_switched'"
            " ORDER BY seq DESC LIMIT 1"
        )
        last, active = (
            str(said[0]) if said else "0",
            self.db.get_meta(meta_keys.ACTIVE_GENERATION) or "0",
        )
        if active != last:
            how = f"the active generation is {active}, and the last switch was to {last}"
            raise Damaged("the database", how)


def verify_blob(sha: str, blob: bytes, what: str) -> bytes:
    """The blob, if it is what was put. Raises KeditError: `what` are damaged."""
    if hashlib.sha256(blob).hexdigest() != sha:
        raise KeditError(
            f"{what} are damaged: the sha256 differs",
            code="corrupt",
            hint="revert the fact and submit it again, or put a backup of the database back",
        )
    return blob
