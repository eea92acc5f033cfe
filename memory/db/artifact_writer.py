"""What is computed from facts: terms, retrieval keys, shards, generations of the weights."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from memory.db import meta_keys
from memory.db.artifact_reader import ArtifactReader
from memory.db.connection import WritingConnection
from memory.db.event_log import to_canonical_json


class ArtifactWriter(ArtifactReader):
    """Writes the artifacts of editing, each inside a transaction of the connection."""

    db: WritingConnection

    def put_terms(self, fact_id: str, blob: bytes) -> None:
        """Keep a fact's keys and targets for the weights tier, in the place of older ones."""
        self.db.upsert_row("terms", "fact_id", {"fact_id": fact_id, **_with_checksum(blob)})

    def drop_terms(self, fact_id: str) -> None:
        """Keep a fact's keys and targets no more."""
        self.db.execute_write("DELETE FROM terms WHERE fact_id = ?", fact_id)

    def put_side_keys(self, fact_id: str, shard: int, blob: bytes) -> None:
        """Keep a fact's retrieval keys, in the place of older ones."""
        self.db.upsert_row(
            "side_keys", "fact_id", {"fact_id": fact_id, "shard": shard, **_with_checksum(blob)}
        )

    def drop_side_keys(self, fact_id: str) -> None:
        """Take a fact's retrieval keys out; harmless where there are none."""
        self.db.execute_write("DELETE FROM side_keys WHERE fact_id = ?", fact_id)

    def add_shard(self, shard_id: int, sha256: str, facts: int, threshold: float) -> None:
        """Add a shard. One that is there already is never overwritten: that fails."""
        row = {
            "sha256": sha256,
            "facts": facts,
            "threshold": threshold,
            "created_at": self.db.format_now(),
        }
        self.db.insert_row("shards", {"id": shard_id, **row})

    def drop_shard(self, shard_id: int) -> None:
        """Forget a shard; harmless where there is none."""
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
        """Add a generation without switching to it; returns its number."""
        return self.db.insert_row(
            "generations",
            {
                "sha256": sha256,
                "weights_hash": weights_hash,
                "parent": parent,
                "reason": reason,
                "fact_ids": to_canonical_json(list(fact_ids)),
                "figures": to_canonical_json(dict(figures)),
                "created_at": self.db.format_now(),
            },
        )

    def activate_generation(self, number: int) -> None:
        """Switch to a generation, which must be known."""
        to, before = self.get_generation(number), self.active_generation()
        self.db.set_meta(meta_keys.ACTIVE_GENERATION, str(number))
        data: dict[str, Any] = {"from": before, "to": number, "weights": to.weights_hash}
        self.db.write_event("generation_switched", reason=to.reason, **data)


def _with_checksum(blob: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(blob).hexdigest(), "tensors": blob}
