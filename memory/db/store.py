"""Store of facts and their states, edits, audits, submissions and job runs.

Every writing method needs an open `db.transaction()`, so that a change and its event are one.
"""

import json
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from memory.canonical_json import to_canonical_json
from memory.db import meta_keys
from memory.db.artifact_writer import ArtifactWriter
from memory.db.connection import WritingConnection
from memory.db.rows import FACT_COLUMNS, StoredFact, escape_file_name, make_fact_row
from memory.errors import KeditError
from memory.facts import OPEN_STATES, Fact, FactState, fact_to_json

JOB_OK = "ok"
"""Outcome of a job run that counts as a success."""
JOB_INTERRUPTED = "interrupted"
"""Outcome of a run that never finished, because the process ended."""


class Store:
    """The one writer of the database, which is the only truth about the daemon's state."""

    def __init__(self, path: Path, clock: Callable[[], datetime]) -> None:
        self.db = WritingConnection(path, clock)
        self.artifacts = ArtifactWriter(self.db)
        if self.db.fetch_one("SELECT 1 FROM generations WHERE id = 0") is None:
            with self.db.transaction():
                self.db.execute_write(
                    "INSERT INTO generations VALUES (0, NULL, '', NULL, 'base', '[]', '{}', ?)",
                    self.db.format_now(),
                )

    def close(self) -> None:
        """Close the connection; committed data are safe without it, too."""
        self.db.close()

    def find_fact(self, name: str) -> StoredFact | None:
        """Return a fact by its id or external id: of several the active one, else the newest."""
        row = self.db.fetch_one(
            f"SELECT {FACT_COLUMNS} FROM facts WHERE external_id = ? "
            f"ORDER BY state IN ({_make_placeholders(OPEN_STATES)}) DESC, seq DESC LIMIT 1",
            *(name, *OPEN_STATES),
        )
        return self._find_by_id(name) or (StoredFact.from_row(row) if row else None)

    def find_facts(self, name: str) -> list[StoredFact]:
        """Return the fact of an id, or all facts of an external id that have not ended; where all
        have, the newest."""
        found = self.find_fact(name)
        if found is None or found.id == name or found.state not in OPEN_STATES:
            return [found] if found else []
        rows = self.db.conn.execute(
            f"SELECT {FACT_COLUMNS} FROM facts WHERE external_id = ?"
            f" AND state IN ({_make_placeholders(OPEN_STATES)}) ORDER BY seq",
            (name, *OPEN_STATES),
        )
        return [StoredFact.from_row(row) for row in rows]

    def find_ended_facts(self, name: str) -> list[StoredFact]:
        """Return the facts of an id or external id that have ended."""
        rows = self.db.conn.execute(
            f"SELECT {FACT_COLUMNS} FROM facts WHERE (id = ? OR external_id = ?)"
            f" AND state NOT IN ({_make_placeholders(OPEN_STATES)}) ORDER BY seq",
            (name, name, *OPEN_STATES),
        )
        return [StoredFact.from_row(row) for row in rows]

    def find_sharing_id(self, fact: Fact) -> str | None:
        """Return the id of a fact that has not ended and has the external id of this one, which
        does not take its place; None where there is none."""
        row = self.db.fetch_one(
            "SELECT id FROM facts WHERE external_id = ? AND slot <> ?"
            f" AND state IN ({_make_placeholders(OPEN_STATES)}) LIMIT 1",
            *(fact.external_id, fact.slot, *OPEN_STATES),
        )
        return str(row[0]) if row else None

    def find_stated(self, fact: Fact) -> StoredFact | None:
        """Return the fact of this statement, whatever its terms: of several (older versions hashed
        the source into the id) the one that has not ended, else the newest."""
        row = self.db.fetch_one(
            f"SELECT {FACT_COLUMNS} FROM facts WHERE slot = ? AND prompt = ? AND target = ? "
            f"ORDER BY state IN ({_make_placeholders(OPEN_STATES)}) DESC, seq DESC LIMIT 1",
            *(fact.slot, fact.prompt, fact.target, *OPEN_STATES),
        )
        return StoredFact.from_row(row) if row else None

    def require_fact(self, fact_id: str) -> StoredFact:
        """Return a fact by its id. Raises KeditError when there is none."""
        fact = self._find_by_id(fact_id)
        if fact is None:
            raise KeditError(f"there is no fact {fact_id}", code="unknown-fact")
        return fact

    def list_facts(
        self, states: Iterable[FactState] = (), slot: str | None = None
    ) -> list[StoredFact]:
        """Return facts in the order of arrival; without `states` those of all states."""
        wanted = tuple(states)
        tests = [f"state IN ({_make_placeholders(wanted)})"] if wanted else []
        values: list[str] = list(wanted)
        if slot is not None:
            tests.append("slot = ?")
            values.append(slot)
        where = f"WHERE {' AND '.join(tests)}" if tests else ""
        sql = f"SELECT {FACT_COLUMNS} FROM facts {where} ORDER BY seq"
        return [StoredFact.from_row(row) for row in self.db.conn.execute(sql, values)]

    def has_facts(self) -> bool:
        """Check that a fact was ever received."""
        return self.db.fetch_one("SELECT 1 FROM facts LIMIT 1") is not None

    def receive_fact(self, fact: Fact, file_name: str, direct: bool) -> StoredFact:
        """Add a fact, or revive one in a final state; it becomes the newest of all."""
        known = self._find_by_id(fact.id)
        if known is not None and known.state in OPEN_STATES:
            raise KeditError(f"fact {fact.id} is {known.state} already", code="duplicate")
        seq = self._next_seq()
        row = make_fact_row(fact, seq, file_name, direct, self.db.format_now())
        self.db.upsert_row("facts", "id", row)
        data: dict[str, Any] = {
            "seq": seq,
            "file": escape_file_name(file_name),
            "direct": direct,
            "fact": json.loads(fact_to_json(fact)),
        }
        if known is None:
            self.db.write_event("fact_received", fact.id, **data)
        else:
            self.db.write_event("fact_revived", fact.id, **data, **{"from": known.state})
        return self.require_fact(fact.id)

    def amend_fact(self, fact: Fact, file_name: str, line: int) -> StoredFact:
        """Replace the terms of a fact that has not ended by those of a newer record of it."""
        known = self.require_fact(fact.id)
        self.db.execute_write(
            "UPDATE facts SET record = ?, external_id = ?, valid_until = ?,"
            " probe = json_remove(probe, '$.chat') WHERE id = ?",
            *(fact_to_json(fact), fact.external_id, fact.valid_until, fact.id),
        )
        file = escape_file_name(file_name)
        changes = known.fact.compare_terms(fact)
        self.db.write_event("fact_amended", fact.id, file=file, line=line, changes=changes)
        return self.require_fact(fact.id)

    def mark_amended(self, fact_ids: Iterable[str]) -> None:
        """Mark facts whose learned texts have changed, so that these are learned."""
        ids = list(dict.fromkeys((*self.list_amended(), *fact_ids)))
        self.db.set_meta(meta_keys.AMENDED, to_canonical_json(ids) if ids else None)

    def unmark_amended(self, fact_ids: Container[str]) -> None:
        """Unmark facts: their new texts are learned, or will be."""
        ids = [n for n in self.list_amended() if n not in fact_ids]
        self.db.set_meta(meta_keys.AMENDED, to_canonical_json(ids) if ids else None)

    def list_amended(self) -> list[str]:
        """List the facts that are still to be learned from their new texts, by id."""
        return list(json.loads(self.db.get_meta(meta_keys.AMENDED) or "[]"))

    def begin_fact(self, fact_id: str) -> StoredFact:
        """Let a scheduled fact begin: from now on it waits to be learned, the newest of all."""
        sql = "UPDATE facts SET seq = ? WHERE id = ?"
        self.db.execute_write(sql, self._next_seq(), fact_id)
        return self.change_state(fact_id, FactState.RECEIVED, reason="valid from now on")

    def change_state(
        self,
        fact_id: str,
        state: FactState,
        *,
        tier: str | None = None,
        generation: int | None = None,
        reason: str | None = None,
        before: str | None = None,
        after: str | None = None,
        probe: Mapping[str, Any] | None = None,
    ) -> StoredFact:
        """Change a fact's state. Answers and probe that are None stay as they were; tier,
        generation and reason are replaced."""
        details = {"reason": reason, "tier": tier, "generation": generation}
        details |= {"before": before, "after": after}
        previous = self.require_fact(fact_id).state
        self.db.execute_write(
            "UPDATE facts SET state = ?, reason = ?, tier = ?, generation = ?, changed_at = ?,"
            " before = coalesce(?, before), after = coalesce(?, after),"
            " probe = coalesce(?, probe) WHERE id = ?",
            *(state, reason, tier, generation, self.db.format_now(), before, after),
            *(_to_json_or_none(probe), fact_id),
        )
        self.db.write_event(f"fact_{state}", fact_id, **{"from": previous, "to": state}, **details)
        return self.require_fact(fact_id)

    def put_probe(self, fact_id: str, probe: Mapping[str, Any]) -> None:
        """Store a fact's probe, in place of the one before."""
        sql = "UPDATE facts SET probe = ? WHERE id = ?"
        self.db.execute_write(sql, to_canonical_json(dict(probe)), fact_id)

    def count_attempt(self, fact_id: str) -> int:
        """Count one more attempt at a fact, and return the new count."""
        self.db.execute_write("UPDATE facts SET attempts = attempts + 1 WHERE id = ?", fact_id)
        return self.require_fact(fact_id).attempts

    def send_to_side(self, fact_id: str, kind: str, **why: Any) -> None:
        """Redirect a waiting fact from the batch to the side memory, without another attempt.
        `kind` and `why` are the event's."""
        self.db.execute_write("UPDATE facts SET direct = attempts % 2 WHERE id = ?", fact_id)
        self.db.write_event(kind, fact_id, **why)

    def has_submission(self, work_name: str) -> bool:
        """Check that a claimed file was taken in already."""
        sql = "SELECT 1 FROM submissions WHERE work_name = ?"
        return self.db.fetch_one(sql, work_name) is not None

    def add_submission(
        self,
        work_name: str,
        file_name: str,
        sha256: str,
        *,
        accepted: int,
        failed: int,
        duplicates: int,
    ) -> None:
        """Record that a claimed file was taken in, with the counts of its records."""
        row = {
            "work_name": work_name,
            "file_name": escape_file_name(file_name),
            "sha256": sha256,
            "received_at": self.db.format_now(),
            "accepted": accepted,
            "failed": failed,
            "duplicates": duplicates,
        }
        self.db.insert_row("submissions", row)

    def add_edit(
        self,
        fact_id: str,
        tier: str,
        generation: int | None,
        seconds: float,
        outcome: str,
        probe: Mapping[str, Any] | None,
    ) -> int:
        """Record one computation of an edit, whatever its outcome."""
        row = {
            "fact_id": fact_id,
            "tier": tier,
            "generation": generation,
            "at": self.db.format_now(),
            "seconds": seconds,
            "outcome": outcome,
            "probe": _to_json_or_none(probe),
        }
        return self.db.insert_row("edits", row)

    def add_audit(
        self,
        generation: int,
        verdict: str,
        figures: Mapping[str, Any],
        reasons: Sequence[str],
        seconds: float,
    ) -> int:
        """Record an audit and its event, and return its id."""
        row: dict[str, Any] = {"generation": generation, "verdict": verdict, "seconds": seconds}
        details: dict[str, Any] = {"figures": dict(figures), "reasons": list(reasons)}
        texts = {name: to_canonical_json(value) for name, value in details.items()}
        number = self.db.insert_row("audits", {"at": self.db.format_now(), **row, **texts})
        self.db.write_event("audit", audit=number, **row, **details)
        return number

    def newest_audit_id(self) -> int:
        """Return the id of the newest audit, or 0."""
        ((number,),) = self.db.conn.execute("SELECT coalesce(max(id), 0) FROM audits")
        return int(number)

    def start_job(self, name: str, scheduled_for: str) -> int:
        """Record that a job starts, and return the id of the run."""
        now = self.db.format_now()
        row = {"name": name, "scheduled_for": scheduled_for, "started_at": now}
        return self.db.insert_row("job_run", row)

    def finish_job(self, run: int, outcome: str, detail: str | None = None) -> None:
        """Record the outcome of a run; only JOB_OK counts as a success."""
        self.db.execute_write(
            "UPDATE job_run SET finished_at = ?, outcome = ?, detail = ? WHERE id = ?",
            *(self.db.format_now(), outcome, detail, run),
        )

    def interrupt_jobs(self) -> None:
        """Mark all runs without an outcome as interrupted."""
        sql = "UPDATE job_run SET outcome = ? WHERE outcome IS NULL"
        self.db.execute_write(sql, JOB_INTERRUPTED)

    def find_last_success(self, name: str) -> str | None:
        """Return the start of a job's last successful run, which covers all planned till then."""
        row = self.db.fetch_one(
            "SELECT started_at FROM job_run WHERE name = ? AND outcome = ? "
            "ORDER BY id DESC LIMIT 1",
            *(name, JOB_OK),
        )
        return row[0] if row else None

    def _find_by_id(self, fact_id: str) -> StoredFact | None:
        row = self.db.fetch_one(f"SELECT {FACT_COLUMNS} FROM facts WHERE id = ?", fact_id)
        return StoredFact.from_row(row) if row else None

    def _next_seq(self) -> int:
        ((seq,),) = self.db.conn.execute("SELECT coalesce(max(seq), 0) + 1 FROM facts")
        return int(seq)


def _make_placeholders(values: Sequence[Any]) -> str:
    return ", ".join("?" * len(values))


def _to_json_or_none(value: Mapping[str, Any] | None) -> str | None:
    return None if value is None else to_canonical_json(dict(value))
