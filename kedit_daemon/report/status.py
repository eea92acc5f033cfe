"""The state of a daemon, from the database, the lock and the folders alone: it may be dead.

Imports nothing heavy, because `status` has to answer at once.
"""

import shutil
import sqlite3
import tomllib
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kedit_daemon.home import Home, open_database
from kedit_daemon.ingest.failed_files import list_failed_files
from kedit_daemon.report.warnings import INTERRUPTED, collect_warnings
from kedit_daemon.system.disk import find_disk_shortage
from kedit_daemon.system.lock import find_lock_holder
from memory.db import meta_keys
from memory.db.overview import fetch_overview
from memory.errors import NoHome
from memory.facts import LIVE_STATES, FactState
from memory.timestamps import format_utc
from policies.cost_curve import fit_curve

EXIT_NOT_RUNNING, EXIT_NEEDS_ATTENTION = 3, 4
# The defaults of the section [schedule], whose own module takes long to import.
DEFAULT_SCHEDULE = {
    "audit": "0 * * * *",
    "consolidate": "0 4 * * *",
    "expire": "* * * * *",
    "retention": "30 2 * * *",
}
# As the edit loop names it, in a module that takes long to import.
QUARANTINED = "quarantined"
_EMPTY_RECORD: dict[str, Any] = {
    "states": dict.fromkeys(map(str, FactState), 0),
    "events": 0,
    "generations": 0,
    "generation": 0,
    "side_keys": 0,
    "side_bytes": 0,
    "failed_today": 0,
    "applied_today": 0,
    "failed_facts": [],
    "jobs": {},
}


def gather_status(
    home: Home, now: datetime, environ: Mapping[str, str], program: str
) -> dict[str, Any]:
    """Return everything that `status` shows, under the keys of its JSON."""
    pid = find_lock_holder(home.lock_file)
    known = _read_database(home, now)
    # Until a new daemon has loaded its model, the database describes the one before.
    starting = pid is not None and known.get("pid") != pid
    # On a full disk not even the pause can be recorded, and a start waits for space.
    full = find_disk_shortage(home.state_folder) if pid is not None else None
    paused = full or (None if starting else known.get("paused") or None)
    oldest = known.get("oldest_received_at")
    found: dict[str, Any] = {
        "state": _daemon_state(pid, starting, paused),
        "since": None if pid is None or starting else known.get("started_at"),
        "pid": pid,
        "paused": paused,
        "flush_held": known.get("flush_held"),
        "publish_failed": known.get("publish_failed"),
        "home": str(home.root),
        "model": known.get("model"),
        "device": known.get("device"),
        "generation": known["generation"],
        "generations": known["generations"],
        "facts": known["states"],
        "weights_facts": known["states"][FactState.LIVE_WEIGHTS],
        **{key: known.get(key) for key in ("weights_capacity", "weights_limit", "flush_cost")},
        "pending": {
            "count": known["states"][FactState.RECEIVED],
            "oldest_received_at": oldest,
            "oldest_seconds": _seconds_since(oldest, now),
        },
        "applied_today": known["applied_today"],
        "failed_today": known["failed_today"],
        "side_memory": {"keys": known["side_keys"], "bytes": known["side_bytes"]},
        "last_audit": known.get("last_audit"),
        "jobs": _describe_jobs(known["jobs"], home, now, environ, pid is not None, starting),
        "events": known["events"],
        "failed_facts": known["failed_facts"],
        "failed_files": list_failed_files(home),
        "disk_free_bytes": shutil.disk_usage(home.root).free if home.root.is_dir() else None,
        "at": format_utc(now, "seconds"),
    }
    found["warnings"] = collect_warnings(found, home, program)
    return found


def choose_exit_code(found: Mapping[str, Any]) -> int:
    """Return 3 when the daemon is not running, 4 when it is and something needs attention."""
    if found["pid"] is None:
        return EXIT_NOT_RUNNING
    return EXIT_NEEDS_ATTENTION if any(w["attention"] for w in found["warnings"]) else 0


def _daemon_state(pid: int | None, starting: bool, paused: str | None) -> str:
    if pid is None:
        return "stopped"
    return "paused" if paused else "starting" if starting else "running"


def _read_database(home: Home, now: datetime) -> dict[str, Any]:
    try:
        with open_database(home) as conn:
            capacity = _read_meta(conn, meta_keys.WEIGHTS_CAPACITY)
            return {
                **fetch_overview(conn, now),
                "applied_today": _count_applied_today(conn, now),
                "failed_facts": _list_failed_facts(conn, now),
                "flush_held": _read_meta(conn, meta_keys.FLUSH_HELD),
                "publish_failed": _read_meta(conn, meta_keys.PUBLISH_FAILED),
                "weights_capacity": None if capacity is None else int(capacity),
                "weights_limit": _read_meta(conn, meta_keys.WEIGHTS_LIMIT),
                "flush_cost": _estimate_flush_cost(conn),
            }
    except NoHome:
        return _EMPTY_RECORD


def _count_applied_today(conn: sqlite3.Connection, now: datetime) -> int:
    """Count the facts that became live today; only today's events are read."""
    today = now.astimezone(UTC).date().isoformat()
    last = conn.execute(
        "SELECT seq FROM events WHERE at < ? ORDER BY seq DESC LIMIT 1", (today,)
    ).fetchone()
    row = conn.execute(
        "SELECT count(DISTINCT fact_id) FROM events WHERE seq > ? AND kind IN (?, ?)"
        " AND json_extract(data, '$.from') = ?",
        (last[0] if last else 0, *(f"fact_{state}" for state in LIVE_STATES), FactState.RECEIVED),
    ).fetchone()
    return int(row[0])


def _list_failed_facts(conn: sqlite3.Connection, now: datetime) -> list[dict[str, Any]]:
    """Return the failed and the quarantined facts that no later fact in their slot replaces, and
    whose time is not over: for those nothing can be done, and nothing need be."""
    rows = conn.execute(
        "SELECT id, reason FROM facts AS failed WHERE (state = ? OR state = ? AND reason LIKE ?)"
        " AND NOT EXISTS"
        " (SELECT 1 FROM facts AS later WHERE later.slot = failed.slot AND later.seq > failed.seq)"
        " AND (valid_until IS NULL OR valid_until > ?) ORDER BY seq DESC",
        (FactState.FAILED, FactState.REVERTED, f"{QUARANTINED}:%", format_utc(now)),
    )
    return [{"id": row["id"], "reason": row["reason"]} for row in rows]


def _read_meta(conn: sqlite3.Connection, key: str) -> str | None:
    """Return what the edit loop has stored under a name."""
    row = conn.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
    return row[0] if row else None


def _estimate_flush_cost(conn: sqlite3.Connection) -> dict[str, Any] | None:
    """Fit the seconds of a flush and of each fact in it; None before two of different sizes."""
    rows = conn.execute(
        "SELECT count(*) AS facts, avg(seconds) AS seconds FROM edits"
        " WHERE tier = 'weights' AND outcome = 'live' GROUP BY generation"
    ).fetchall()
    if len({row["facts"] for row in rows}) < 2:
        return None
    curve = fit_curve([(row["facts"], row["seconds"]) for row in rows])
    return {"flushes": len(rows), **asdict(curve)}


def _describe_jobs(
    last: Mapping[str, Any],
    home: Home,
    now: datetime,
    environ: Mapping[str, str],
    running: bool,
    starting: bool,
) -> dict[str, Any]:
    schedule = _read_schedule(home.config_file, environ)
    at_work = running and not starting  # a killed process leaves its rows as they were
    jobs = {}
    for name in sorted({*schedule, *last}):
        run = last.get(name) or {}
        due = _find_next_run(schedule[name], now) if running and name in schedule else None
        jobs[name] = {
            "started_at": run.get("started_at"),
            "finished_at": run.get("finished_at"),
            "outcome": run.get("outcome") or (INTERRUPTED if run and not at_work else None),
            "detail": run.get("detail"),
            "next": format_utc(due, "seconds") if due else None,
        }
    return jobs


def _find_next_run(cron: str, now: datetime) -> datetime | None:
    """Return the first time after `now` (UTC) that the expression names, if there is one."""
    # Imported only here: it takes 35 ms, and only a running daemon has a next run.
    from apscheduler.triggers.cron import CronTrigger

    try:
        trigger = CronTrigger.from_crontab(cron, timezone=UTC)
    except ValueError:
        return None
    due: datetime | None = trigger.get_next_fire_time(now, now)  # later than a run at `now`
    return due


def _read_schedule(path: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the cron expressions as the daemon has them; `doctor` explains a broken file."""
    try:
        section = tomllib.loads(path.read_text("utf-8-sig")).get("schedule")
    except (OSError, ValueError):
        section = None
    given = section if isinstance(section, dict) else {}
    return {
        name: str(environ.get(f"KEDIT_SCHEDULE_{name.upper()}", given.get(name, default)))
        for name, default in DEFAULT_SCHEDULE.items()
    }


def _seconds_since(time: str | None, now: datetime) -> float | None:
    if time is None:
        return None
    return max(0.0, (now - datetime.fromisoformat(time)).total_seconds())
