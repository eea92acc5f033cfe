"""Writes of what editing has computed: terms, retrieval keys, shards, generations."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from memory.canonical_json import to_canonical_json
from memory.db import meta_keys
from memory.db.artifact_reader import ArtifactReader
from memory.db.connection import WritingConnection


class ArtifactWriter(ArtifactReader):
    """Reader and writer of the artifacts of editing; a write needs an open transaction."""

    db: WritingConnection

    def put_terms(self, fact_id: str, blob: bytes) -> None:
        """Store a fact's terms, its keys and targets for the weights, in place of older ones."""
        self.db.upsert_row("terms", "fact_id", {"fact_id": fact_id, **_with_checksum(blob)})

    def drop_terms(self, fact_id: str) -> None:
        """Delete a fact's terms, if any."""
        self.db.execute_write("DELETE FROM terms WHERE fact_id = ?", fact_id)

    def put_side_keys(self, fact_id: str, shard: int, blob: bytes) -> None:
        """Store a fact's retrieval keys, in place of older ones."""
        row = {"fact_id": fact_id, "shard": shard, **_with_checksum(blob)}
        self.db.upsert_row("side_keys", "fact_id", row)

    def move_side_keys(self, fact_id: str, shard: int) -> None:
        """Give a fact another shard, behind the keys that it has."""
        sql = "UPDATE side_keys SET shard = ? WHERE fact_id = ?"
        self.db.execute_write(sql, shard, fact_id)

    def drop_side_keys(self, fact_id: str) -> None:
        """Delete a fact's retrieval keys, if any."""
        self.db.execute_write("DELETE FROM side_keys WHERE fact_id = ?", fact_id)

    def add_shard(self, shard_id: int, sha256: str, facts: int, threshold: float) -> None:
        """Add a shard; fails when the id is taken: a shard is never overwritten."""
        row = {
            "id": shard_id,
            "sha256": sha256,
            "facts": facts,
            "threshold": threshold,
            "created_at": self.db.format_now(),
        }
        self.db.insert_row("shards", row)

    def drop_shard(self, shard_id: int) -> None:
        """Delete a shard, if it exists."""
        self.db.execute_write("DELETE FROM shards WHERE id = ?", shard_id)

    def add_generation(
        self,
        sha256: str | None,
        weights_hash: str,
        parent: int | None,
        reason: str,
        fact_ids: Sequence[str],
        figures: Mapping[str, Any],
    ) -> int:
        """Add a generation without switching to it, and return its number."""
        row = {
            "sha256": sha256,
            "weights_hash": weights_hash,
            "parent": parent,
            "reason": reason,
            "fact_ids": to_canonical_json(list(fact_ids)),
            "figures": to_canonical_json(dict(figures)),
            "created_at": self.db.format_now(),
        }
        return self.db.insert_row("generations", row)

    def activate_generation(self, number: int) -> None:
        """Make a known generation the active one."""
        to, before = self.get_generation(number), self.active_generation()
        self.db.set_meta(meta_keys.ACTIVE_GENERATION, str(number))
        data: dict[str, Any] = {"from": before, "to": number, "weights": to.weights_hash}
        self.db.write_event("generation_switched", reason=to.reason, **data)


def _with_checksum(blob: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(blob).hexdigest(), "tensors": blob}
