"""What is computed from facts: terms, retrieval keys, shards, generations of the weights."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from memory.db.connection import Journal
from memory.db.derived import Derived
from memory.db.event_log import canonical


class Artifacts(Derived, Journal):
    """The part of the store that keeps what editing has computed."""

    def put_terms(self, fact_id: str, blob: bytes) -> None:
        """Keep a fact's keys and targets for the weights tier, in the place of older ones."""
        self._upsert("terms", "fact_id", {"fact_id": fact_id, **_sealed(blob)})

    def drop_terms(self, fact_id: str) -> None:
        """Keep a fact's keys and targets no more."""
        self._write("DELETE FROM terms WHERE fact_id = ?", fact_id)

    def put_side(self, fact_id: str, shard: int, blob: bytes) -> None:
        """Keep a fact's retrieval keys, in the place of older ones."""
        self._upsert("side_keys", "fact_id", {"fact_id": fact_id, "shard": shard, **_sealed(blob)})

    def drop_side(self, fact_id: str) -> None:
        """Take a fact's retrieval keys out; harmless where there are none."""
        self._write("DELETE FROM side_keys WHERE fact_id = ?", fact_id)

    def put_shard(self, shard_id: int, sha256: str, facts: int, threshold: float) -> None:
        """Add a shard. One that is there already is never overwritten: that fails."""
        row = {"sha256": sha256, "facts": facts, "threshold": threshold, "created_at": self.now()}
        self._insert("shards", {"id": shard_id, **row})

    def drop_shard(self, shard_id: int) -> None:
        """Forget a shard; harmless where there is none."""
        self._write("DELETE FROM shards WHERE id = ?", shard_id)

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
        return self._insert(
            "generations",
            {
                "sha256": sha256,
                "weights_hash": weights_hash,
                "parent": parent,
                "reason": reason,
                "fact_ids": canonical(list(fact_ids)),
                "figures": canonical(dict(figures)),
                "created_at": self.now(),
            },
        )

    def activate(self, number: int) -> None:
        """Switch to a generation, which must be known."""
        to, before = self.generation(number), self.active_generation()
        self.set_meta("active_generation", str(number))
        data: dict[str, Any] = {"from": before, "to": number, "weights": to.weights_hash}
        self.event("generation_switched", reason=to.reason, **data)


def _sealed(blob: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(blob).hexdigest(), "tensors": blob}
