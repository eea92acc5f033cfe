"""Overview of a daemon: the figures of one screen, from one snapshot of its database."""

import sqlite3
from datetime import UTC, datetime
from typing import Any

from memory.db import meta_keys
from memory.db.queries import fetch_dicts
from memory.facts import FactState


def fetch_overview(conn: sqlite3.Connection, now: datetime | None = None) -> dict[str, Any]:
    """Return the figures of one screen; `now` decides which failures are today's (UTC)."""
    today = (now or datetime.now(UTC)).astimezone(UTC).date().isoformat()
    newest_audit = "SELECT * FROM audits ORDER BY id DESC LIMIT 1"
    newest_runs = (
        "SELECT * FROM job_run WHERE id IN (SELECT max(id) FROM job_run GROUP BY name)"
        " ORDER BY name"
    )
    oldest = "SELECT min(changed_at) FROM facts WHERE state = ?"
    conn.execute("BEGIN")  # one snapshot of the database for all figures
    try:
        return {
            **_count_rows(conn),
            **_fetch_identity(conn),
            **_measure_side_keys(conn),
            "failed_today": _count_failures(conn, today),
            "oldest_received_at": conn.execute(oldest, (FactState.RECEIVED,)).fetchone()[0],
            "last_audit": next(fetch_dicts(conn, newest_audit), None),
            "jobs": {row["name"]: row for row in fetch_dicts(conn, newest_runs)},
        }
    finally:
        conn.rollback()


def _count_rows(conn: sqlite3.Connection) -> dict[str, Any]:
    states = dict.fromkeys((str(state) for state in FactState), 0)
    states |= dict(map(tuple, conn.execute("SELECT state, count(*) FROM facts GROUP BY state")))
    seq, generations = conn.execute(
        "SELECT (SELECT max(seq) FROM events), (SELECT count(*) FROM generations)"
    ).fetchone()
    return {"states": states, "events": seq or 0, "generations": generations}


def _fetch_identity(conn: sqlite3.Connection) -> dict[str, Any]:
    meta = dict(map(tuple, conn.execute("SELECT key, value FROM meta")))
    shown = (meta_keys.MODEL, meta_keys.DEVICE, meta_keys.STARTED_AT, meta_keys.PAUSED)
    pid = meta.get(meta_keys.PID, "")
    return {
        **{key: meta.get(key) for key in shown},
        "pid": int(pid) if pid.isdecimal() else None,
        "generation": int(meta.get(meta_keys.ACTIVE_GENERATION, 0)),
    }


def _measure_side_keys(conn: sqlite3.Connection) -> dict[str, Any]:
    keys, size = conn.execute(
        "SELECT count(*), coalesce(sum(length(tensors)), 0) FROM side_keys"
    ).fetchone()
    return {"side_keys": keys, "side_bytes": size}


def _count_failures(conn: sqlite3.Connection, today: str) -> int:
    # Records that never became facts, and facts that could not be made live.
    records, facts = conn.execute(
        "SELECT (SELECT coalesce(sum(failed), 0) FROM submissions WHERE received_at >= ?),"
        " (SELECT count(*) FROM facts WHERE state = ? AND changed_at >= ?)",
        (today, FactState.FAILED, today),
    ).fetchone()
    return int(records) + int(facts)
