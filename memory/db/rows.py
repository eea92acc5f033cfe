"""What the store hands out: one frozen record per kind of row."""

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
AUDIT_COLUMNS = "id, at, generation, verdict, figures, reasons, seconds"


@dataclass(frozen=True)
class StoredFact:
    """A fact with where it stands; `before` and `after` are the model's answers, if measured."""

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
        """The fact's id."""
        return self.fact.id

    @classmethod
    def from_row(cls, row: tuple[Any, ...]) -> "StoredFact":
        """From a row of FACT_COLUMNS. Raises KeditError (78) where it is not what was put."""
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
    """SQLite has no sums of its own over what it keeps."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Damaged(what, str(error)) from error


def escape_file_name(name: str) -> str:
    """A file's name as text that SQLite takes: bytes that are not UTF-8 become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def make_fact_row(fact: Fact, seq: int, file_name: str, direct: bool, now: str) -> dict[str, Any]:
    """Every column of a fact that has just been received, also where it comes back."""
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
    """The retrieval keys of one fact in the side memory."""

    fact_id: str
    shard: int
    blob: bytes


@dataclass(frozen=True)
class ShardRow:
    """One shard of the side memory; its file is named by the sha256."""

    id: int
    sha256: str
    facts: int
    threshold: float
    created_at: str


@dataclass(frozen=True)
class GenerationRow:
    """One write of the weights; the base, which has no file, is number 0."""

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
        """From a row of GENERATION_COLUMNS."""
        values = dict(zip(GENERATION_COLUMNS.split(", "), row, strict=True))
        with _raise_as_damage(f"generation {values['id']} in the database"):
            values["fact_ids"] = tuple(json.loads(values["fact_ids"]))
            values["figures"] = json.loads(values["figures"])
        return cls(**values)


@dataclass(frozen=True)
class AuditRow:
    """One audit, with its figures and the reasons for its verdict."""

    id: int
    at: str
    generation: int
    verdict: str
    figures: dict[str, Any]
    reasons: tuple[str, ...]
    seconds: float

    @classmethod
    def from_row(cls, row: tuple[Any, ...]) -> "AuditRow":
        """From a row of AUDIT_COLUMNS."""
        values = dict(zip(AUDIT_COLUMNS.split(", "), row, strict=True))
        values["figures"] = json.loads(values["figures"])
        values["reasons"] = tuple(json.loads(values["reasons"]))
        return cls(**values)
