"""The state of a home that an export is made from, read in one transaction; it only reads."""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kedit_daemon.home import Home, open_database
from memory.db import meta_keys
from memory.db.follower import Follower
from memory.db.rows import GENERATION_COLUMNS, GenerationRow
from memory.errors import NoHome
from memory.facts import LIVE_STATES, Fact, FactState, fact_from_json


@dataclass(frozen=True)
class ExportSource:
    """The active generation of a home, and the facts that are live."""

    home: Home
    origin: str  # the hash of the first event: no other home has it
    model: str  # as configured
    base_hash: str
    generation: GenerationRow
    in_weights: tuple[Fact, ...]  # in the weights, in the order of their arrival
    side_only: tuple[Fact, ...]  # in the side memory alone
    live: tuple[Fact, ...]  # both

    @property
    def short_name(self) -> str:
        """The model's name without its folders, for file names."""
        last = Path(self.model).name or "model"
        kept = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in last)
        return kept[:80].strip(".-") or "model"


@dataclass(frozen=True)
class WrittenExport:
    """The entries that a kind adds to the manifest, and notes for the user."""

    manifest_entries: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_source(home: Home) -> ExportSource:
    """Read the home as it is now, whether the daemon runs or not.

    Raises KeditError when no daemon has run there yet, or the database cannot be read.
    """
    with open_database(home) as conn:
        conn.execute("BEGIN")  # one state, while the daemon goes on
        return _read_generation(conn, home)


def read_edit_terms(home: Home, fact_ids: Sequence[str]) -> dict[str, bytes]:
    """Read the stored keys and targets of these facts, by id."""
    follower = Follower(home.database_file)
    try:
        return {fact_id: follower.artifacts.read_terms(fact_id) for fact_id in fact_ids}
    finally:
        follower.close()


def _read_generation(conn: sqlite3.Connection, home: Home) -> ExportSource:
    meta = dict(map(tuple, conn.execute("SELECT key, value FROM meta")))
    if not {meta_keys.MODEL, meta_keys.BASE_HASH} <= meta.keys():
        hint = "kedit-daemon run, and submit facts"
        raise NoHome(f"no daemon has run in {home.root} yet", hint=hint)
    number = int(meta.get(meta_keys.ACTIVE_GENERATION) or 0)
    row = conn.execute(
        f"SELECT {GENERATION_COLUMNS} FROM generations WHERE id = ?", (number,)
    ).fetchone()
    generation = GenerationRow.from_row(tuple(row))
    states = _read_facts(conn)
    inside = set(generation.fact_ids)
    origin = conn.execute("SELECT hash FROM events ORDER BY seq LIMIT 1").fetchone()
    return ExportSource(
        home=home,
        origin=str(origin[0]) if origin else "",
        model=meta[meta_keys.MODEL],
        base_hash=meta[meta_keys.BASE_HASH],
        generation=generation,
        in_weights=tuple(f for f, _ in states if f.id in inside),
        side_only=tuple(f for f, state in states if state == FactState.LIVE_SIDE),
        live=tuple(f for f, state in states if state in LIVE_STATES),
    )


def _read_facts(conn: sqlite3.Connection) -> list[tuple[Fact, Any]]:
    rows = conn.execute("SELECT record, state FROM facts ORDER BY seq")
    return [(fact_from_json(row["record"]), row["state"]) for row in rows]
