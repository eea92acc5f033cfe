"""Queries for what editing has computed, for the store and for followers of a database."""

import hashlib
import json
from contextlib import suppress
from typing import Any

from memory.db import meta_keys
from memory.db.connection import ReadingConnection
from memory.db.rows import GENERATION_COLUMNS, SHARD_COLUMNS, GenerationRow, ShardRow, SideKeysRow
from memory.errors import Damaged, KeditError
from memory.facts import LIVE_STATES


class ArtifactReader:
    """Reader of the artifacts of editing: terms, retrieval keys, shards, generations."""

    def __init__(self, db: ReadingConnection) -> None:
        self.db = db

    def read_terms(self, fact_id: str) -> bytes:
        """Return a fact's terms, its keys and targets for the weights, as a safetensors blob."""
        row = self.db.fetch_one("SELECT sha256, tensors FROM terms WHERE fact_id = ?", fact_id)
        if row is None:
            raise KeditError(f"fact {fact_id} has no terms for the weights", code="no-terms")
        return verify_blob(row[0], row[1], f"the terms of fact {fact_id}")

    def has_terms(self, fact_id: str) -> bool:
        """Check that a fact's terms are stored."""
        return self.db.fetch_one("SELECT 1 FROM terms WHERE fact_id = ?", fact_id) is not None

    def find_any_terms(self) -> bytes | None:
        """Return the terms of some fact, if any can be read."""
        for (fact_id,) in self.db.conn.execute("SELECT fact_id FROM terms"):
            with suppress(KeditError):
                return self.read_terms(fact_id)
        return None

    def read_side_keys(self) -> list[SideKeysRow]:
        """Return all readable retrieval keys, by shard: a damaged row must not hide the others."""
        rows = self.db.conn.execute(
            "SELECT fact_id, shard, sha256, tensors FROM side_keys ORDER BY shard, fact_id"
        )
        readable = []
        for fact_id, shard, sha, blob in rows:
            with suppress(KeditError):
                keys = verify_blob(sha, blob, f"the side keys of fact {fact_id}")
                readable.append(SideKeysRow(fact_id, shard, keys))
        return readable

    def list_side_fact_ids(self) -> set[str]:
        """Return the ids of facts that have retrieval keys, without reading the keys."""
        return {fact_id for (fact_id,) in self.db.conn.execute("SELECT fact_id FROM side_keys")}

    def list_shards(self) -> list[ShardRow]:
        """Return all shards, oldest first."""
        rows = self.db.conn.execute(f"SELECT {SHARD_COLUMNS} FROM shards ORDER BY id")
        return [ShardRow(*row) for row in rows]

    def list_unprobed_shards(self) -> list[tuple[str, str]]:
        """Return live facts whose shard was not probed in a chat, with the shard's sha256."""
        return self._find_live_shards("json_extract(f.probe, '$.chat.shard') IS NOT s.sha256")

    def list_shards_to_relearn(self) -> list[tuple[str, str]]:
        """Return live facts that wait to be learned again, since their shard was probed in a chat,
        with the shard's sha256."""
        waits = "json_extract(f.probe, '$.chat.relearning') = 'waits'"
        return self._find_live_shards(
            f"json_extract(f.probe, '$.chat.shard') = s.sha256 AND {waits}"
        )

    def _find_live_shards(self, test: str) -> list[tuple[str, str]]:
        rows = self.db.conn.execute(
            "SELECT f.id, s.sha256 FROM facts f JOIN side_keys k ON k.fact_id = f.id"
            " JOIN shards s ON s.id = k.shard WHERE f.state IN (?, ?)"
            f" AND {test} ORDER BY f.seq",
            LIVE_STATES,
        )
        return [(str(fact_id), str(sha)) for fact_id, sha in rows]

    def get_generation(self, number: int) -> GenerationRow:
        """Return one generation; 0 is the base."""
        sql = f"SELECT {GENERATION_COLUMNS} FROM generations WHERE id = ?"
        row = self.db.fetch_one(sql, number)
        if row is None:
            raise KeditError(f"there is no generation {number}", code="unknown-generation")
        return GenerationRow.from_row(row)

    def list_measurements(self, limit: int = 100) -> list[tuple[int, dict[str, Any]]]:
        """Return (count of facts, figures) of the latest generations with facts, newest first."""
        rows = self.db.conn.execute(
            "SELECT json_array_length(fact_ids), figures FROM generations"
            " WHERE sha256 IS NOT NULL ORDER BY id DESC LIMIT ?",
            (limit,),
        )
        return [(int(count), json.loads(figures)) for count, figures in rows]

    def active_generation(self) -> int:
        """Return the number of the generation that is served."""
        return int(self.db.get_meta(meta_keys.ACTIVE_GENERATION) or 0)

    def check_active_generation(self) -> None:
        """Raise Damaged when the active generation is not that of the last switch event."""
        switch = self.db.fetch_one(
            "SELECT json_extract(data, '$.to') FROM events WHERE kind = 'generation_switched'"
            " ORDER BY seq DESC LIMIT 1"
        )
        last = str(switch[0]) if switch else "0"
        active = self.db.get_meta(meta_keys.ACTIVE_GENERATION) or "0"
        if active != last:
            how = f"the active generation is {active}, and the last switch was to {last}"
            raise Damaged("the database", how)


def verify_blob(sha: str, blob: bytes, what: str) -> bytes:
    """Return the blob when its sha256 is right, else raise KeditError: `what` are damaged."""
    if hashlib.sha256(blob).hexdigest() != sha:
        raise KeditError(
            f"{what} are damaged: the sha256 differs",
            code="corrupt",
            hint="revert the fact and submit it again, or put a backup of the database back",
        )
    return blob
