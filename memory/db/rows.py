"""Records of the rows that the store returns, one frozen class per table."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from memory.errors import Damaged
from memory.facts import Fact, FactState, fact_from_json, fact_to_json

FACT_COLUMNS = (
    "id, record, seq, state, tier, generation, direct, reason, file_name, received_at, changed_at,"
    " attempts, before, after, probe"
)
GENERATION_COLUMNS = "id, sha256, weights_hash, parent, reason, fact_ids, figures, created_at"
SHARD_COLUMNS = "id, sha256, facts, threshold, created_at"


@dataclass(frozen=True)
class StoredFact:
    """A fact with its state; `before` and `after` are the model's answers, if measured."""

    fact: Fact
    seq: int
    state: FactState
    tier: str | None
    generation: int | None
    direct: bool
    reason: str | None
    file_name: str
    received_at: str
    changed_at: str
    attempts: int
    before: str | None
    after: str | None
    probe: dict[str, Any] | None

    @property
    def id(self) -> str:
        """Id of the fact."""
        return self.fact.id

    @classmethod
    def from_row(cls, row: tuple[Any, ...]) -> "StoredFact":
        """Convert a row of FACT_COLUMNS. Raises Damaged when it is not as it was written."""
        values = dict(zip(FACT_COLUMNS.split(", "), row, strict=True))
        fact_id = values.pop("id")
        with _raise_as_damage(f"fact {fact_id} in the database"):
            values["fact"] = fact_from_json(values.pop("record"))
            values["state"] = FactState(values["state"])
            values["direct"] = bool(values["direct"])
            values["probe"] = json.loads(values["probe"]) if values["probe"] else None
            if values["fact"].id != fact_id:
                raise ValueError("its id is that of another record")
        return cls(**values)


@contextmanager
def _raise_as_damage(what: str) -> Iterator[None]:
    """Convert errors of parsing to Damaged: SQLite has no checksums over its content."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(what, str(error)) from error


def escape_file_name(name: str) -> str:
    """Convert a file name to text that SQLite takes: bytes that are not UTF-8 are escaped."""
    return name.encode("utf-8", "backslashreplace").decode()


def make_fact_row(fact: Fact, seq: int, file_name: str, direct: bool, now: str) -> dict[str, Any]:
    """Make all columns of a fact that was just received, for the first time or again."""
    return {
        "id": fact.id,
        "seq": seq,
        "slot": fact.slot,
        "subject": fact.subject,
        "prompt": fact.prompt,
        "target": fact.target,
        "record": fact_to_json(fact),
        "state": FactState.RECEIVED,
        "tier": None,
        "generation": None,
        "direct": int(direct),
        "reason": None,
        "file_name": escape_file_name(file_name),
        "received_at": now,
        "changed_at": now,
        "attempts": 0,
        "external_id": fact.external_id,
        "valid_until": fact.valid_until,
        "before": None,
        "after": None,
        "probe": None,
    }


@dataclass(frozen=True)
class SideKeysRow:
    """Retrieval keys of one fact of the side memory."""

    fact_id: str
    shard: int
    blob: bytes


@dataclass(frozen=True)
class ShardRow:
    """A shard of the side memory; its file is named by the sha256."""

    id: int
    sha256: str
    facts: int
    threshold: float
    created_at: str


@dataclass(frozen=True)
class GenerationRow:
    """A generation of the weights; number 0 is the base, which has no file."""

    id: int
    sha256: str | None
    weights_hash: str
    parent: int | None
    reason: str
    fact_ids: tuple[str, ...]
    figures: dict[str, Any]
    created_at: str

    @classmethod
    def from_row(cls, row: tuple[Any, ...]) -> "GenerationRow":
        """Convert a row of GENERATION_COLUMNS. Raises Damaged."""
        values = dict(zip(GENERATION_COLUMNS.split(", "), row, strict=True))
        with _raise_as_damage(f"generation {values['id']} in the database"):
            values["fact_ids"] = tuple(json.loads(values["fact_ids"]))
            values["figures"] = json.loads(values["figures"])
        return cls(**values)
