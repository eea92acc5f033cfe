"""The append-only event table: each event carries the hash of the one before.

Tamper-evident, not tamper-proof: an edit or a removal in the middle breaks the chain; a missing
tail is detected only by a head that was kept outside the database.
"""

import hashlib
import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory.canonical_json import to_canonical_json
from memory.errors import KeditError
from memory.files import write_atomic

GENESIS_HASH = "0" * 64
HEAD_FILE = "audit.head"
_COLUMNS = "seq, at, kind, fact_id, data, previous, hash"


@dataclass(frozen=True)
class Event:
    """An event and its place in the chain."""

    seq: int
    at: str
    kind: str
    fact_id: str | None
    data: dict[str, Any]
    previous: str
    hash: str


@dataclass(frozen=True)
class ChainVerdict:
    """Result of checking the chain; `problem` is empty when it is intact."""

    intact: bool
    events: int
    head_seq: int
    head_hash: str
    problem: str


def append_event(
    conn: sqlite3.Connection,
    at: str,
    kind: str,
    fact_id: str | None = None,
    data: dict[str, Any] | None = None,
) -> Event:
    """Append an event inside the open transaction, so that it is committed with its change."""
    if not conn.in_transaction:
        raise KeditError("an event was written outside a transaction", code="no-transaction")
    last = conn.execute("SELECT seq, hash FROM events ORDER BY seq DESC LIMIT 1").fetchone()
    seq, previous = (last[0] + 1, last[1]) if last else (1, GENESIS_HASH)
    text = to_canonical_json(data or {})
    digest = _hash_event(seq, at, kind, fact_id, text, previous)
    conn.execute(
        f"INSERT INTO events({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (seq, at, kind, fact_id, text, previous, digest),
    )
    return Event(seq, at, kind, fact_id, json.loads(text), previous, digest)


def read_newest_event(conn: sqlite3.Connection) -> Event | None:
    """Return the newest event, or None when there is none yet."""
    row = conn.execute(f"SELECT {_COLUMNS} FROM events ORDER BY seq DESC LIMIT 1").fetchone()
    if row is None:
        return None
    seq, at, kind, fact_id, text, previous, digest = row
    return Event(seq, at, kind, fact_id, json.loads(text), previous, digest)


def verify_chain(conn: sqlite3.Connection, head: tuple[int, str] | None) -> ChainVerdict:
    """Check the chain from its start; `head` is a (seq, hash) kept outside the database."""
    seq, last, problem = 0, GENESIS_HASH, ""
    for row in conn.execute(f"SELECT {_COLUMNS} FROM events ORDER BY seq"):
        problem = _find_problem(tuple(row), seq, last, head)
        if problem:
            break
        seq, last = row[0], row[6]
    if not problem and head is not None and head[0] > seq:
        problem = f"the events after {seq} are missing: the kept head is event {head[0]}"
    return ChainVerdict(not problem, seq, seq, last, problem)


def read_head(path: Path) -> tuple[int, str] | None:
    """Read the kept head (seq, hash), or None when none has been kept yet."""
    try:
        kept = json.loads(path.read_bytes())
        return int(kept["seq"]), str(kept["hash"])
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise KeditError(
            f"{path} is not a kept head of the audit log",
            code="corrupt",
            hint="compare `kedit-daemon log verify` with the head in the system log, "
            f"then remove {path}",
        ) from error


def write_head(path: Path, event: Event) -> None:
    """Write the newest event's seq and hash to a file outside the database."""
    kept = {"seq": event.seq, "hash": event.hash, "at": event.at}
    write_atomic(path, to_canonical_json(kept).encode() + b"\n")


def _hash_event(seq: int, at: str, kind: str, fact_id: str | None, text: str, previous: str) -> str:
    # The data are hashed as the stored text, byte by byte.
    line = to_canonical_json([seq, at, kind, fact_id, text, previous])
    return hashlib.sha256(line.encode()).hexdigest()


def _find_problem(row: tuple[Any, ...], seq: int, last: str, head: tuple[int, str] | None) -> str:
    *event, digest = row
    number, previous = event[0], event[5]
    if number != seq + 1:
        return f"event {seq + 1} is missing: event {number} follows event {seq}"
    if previous != last:
        return f"event {number} does not follow from the event before it"
    if digest != _hash_event(*event):
        return f"event {number} has been changed"
    if head is not None and head[0] == number and digest != head[1]:
        return f"event {number} differs from the kept head: history has been rewritten"
    return ""
