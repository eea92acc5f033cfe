"""What an export is made from, read at one moment from the home alone; nothing is written there."""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kedit_daemon.cli.context import database
from kedit_daemon.home import Home
from memory.db.follower import Follower
from memory.db.rows import GENERATION_COLUMNS, GenerationRow
from memory.errors import KeditError
from memory.facts import LIVE, Fact, State, from_json


@dataclass(frozen=True)
class Source:
    """The active generation of a home, and the facts that are live."""

    home: Home
    origin: str  # the hash of the first event: no other home has it
    model: str  # as configured
    base_hash: str
    generation: GenerationRow
    inside: tuple[Fact, ...]  # in the weights, in the order of their arrival
    beside: tuple[Fact, ...]  # in the side memory alone
    live: tuple[Fact, ...]  # both

    @property
    def name(self) -> str:
        """The model's short name, for people and file names."""
        last = Path(self.model).name or "model"
        kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in last)
        return kept[:80].strip(".-") or "model"


@dataclass(frozen=True)
class Written:
    """What a kind adds to the manifest, and what people shall hear of it."""

    told: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_source(home: Home) -> Source:
    """The home as it is now, whether the daemon runs or not.

    Raises KeditError when no daemon has run there yet, or the database cannot be read.
    """
    with database(home) as conn:
        conn.execute("BEGIN")  # one moment, while the daemon goes on
        return _read(conn, home)


def read_terms(home: Home, fact_ids: Sequence[str]) -> dict[str, bytes]:
    """The keys and targets of these facts, by id."""
    follower = Follower(home.database)
    try:
        return {fact_id: follower.terms(fact_id) for fact_id in fact_ids}
    finally:
        follower.close()


def _read(conn: sqlite3.Connection, home: Home) -> Source:
    meta = dict(map(tuple, conn.execute("SELECT key, value FROM meta")))
    if "model" not in meta or "base_hash" not in meta:
        raise KeditError(
            f"no daemon has run in {home.root} yet",
            code="no-home",
            hint="kedit-daemon run, and hand facts in",
        )
    number = int(meta.get("active_generation") or 0)
    row = conn.execute(
        f"SELECT {GENERATION_COLUMNS} FROM generations WHERE id = ?", (number,)
    ).fetchone()
    generation = GenerationRow.of(tuple(row))
    states = _facts(conn)
    inside = set(generation.fact_ids)
    origin = conn.execute("SELECT hash FROM events ORDER BY seq LIMIT 1").fetchone()
    return Source(
        home=home,
        origin=str(origin[0]) if origin else "",
        model=meta["model"],
        base_hash=meta["base_hash"],
        generation=generation,
        inside=tuple(f for f, _ in states if f.id in inside),
        beside=tuple(f for f, state in states if state == State.LIVE_SIDE),
        live=tuple(f for f, state in states if state in LIVE),
    )


def _facts(conn: sqlite3.Connection) -> list[tuple[Fact, Any]]:
    rows = conn.execute("SELECT record, state FROM facts ORDER BY seq")
    return [(from_json(row["record"]), row["state"]) for row in rows]
