"""Checks of the installation and of a home; each failure names its remedy.

The checks only read, and work whether the daemon runs or not. `clean_home` alone removes files.
"""

import os
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

from kedit_daemon.home import Home, open_database
from kedit_daemon.ingest.failed_files import list_failed_files
from kedit_daemon.maintenance import doctor_install as install
from kedit_daemon.maintenance.doctor_install import FAILED, OK, REINSTALL, WARNING, CheckResult
from kedit_daemon.report.warnings import LOW_DISK_BYTES
from kedit_daemon.system.lock import find_lock_holder, hold_lock
from kedit_daemon.system.orphans import find_leftovers, remove_leftovers
from memory.errors import KeditError, Unreadable

CRITICAL_BYTES = 50 << 20
CLOCK_SLACK = timedelta(minutes=5)
BACKUP_REMEDY = "keep a copy of state/ as it is, then put a backup back"


def run_checks(home: Home, environ: Mapping[str, str], now: datetime) -> Iterator[CheckResult]:
    """Run all checks and yield each result at once."""
    checks: dict[str, Callable[[], Iterator[CheckResult]]] = {
        "python": install.check_python,
        "packages": install.check_packages,
        "faiss": install.check_faiss,
        "sqlite": install.check_sqlite,
        "extras": lambda: install.check_extras(home, environ),
        "unit": install.check_unit,
        "home": lambda: _check_home(home),
        "config": lambda: _check_config(home, environ),
        "disk": lambda: _check_disk(home),
        "daemon": lambda: _check_daemon(home),
        "database": lambda: _check_database(home),
        "chain": lambda: _check_chain(home),
        "clock": lambda: _check_clock(home, now),
        "weights": lambda: _check_weights(home),
        "leftovers": lambda: _check_leftovers(home),
        "inbox": lambda: _check_inbox(home),
    }
    for name, check in checks.items():
        try:
            yield from check()
        except KeditError as error:
            remedy = BACKUP_REMEDY if isinstance(error, Unreadable) else error.hint
            yield CheckResult(name, FAILED, str(error), remedy)
        except sqlite3.Error as error:
            yield CheckResult(name, FAILED, f"{home.database_file}: {error}", BACKUP_REMEDY)
        except OSError as error:
            yield CheckResult(name, FAILED, str(error), "run as the user that the daemon runs as")


def clean_home(home: Home) -> list[Path]:
    """Remove what a crash has left and return its paths.

    Raises KeditError: a daemon holds the home (75), or something cannot be removed.
    """
    if not home.state_folder.is_dir():
        return []
    with hold_lock(home.lock_file):
        leftovers = _find_leftovers(home)
        try:
            remove_leftovers(leftovers)
        except OSError as error:
            raise KeditError(
                f"{error.filename} cannot be removed: {error.strerror}",
                code="no-permission",
                hint="run as the user that the daemon runs as",
            ) from error
    return leftovers


def _find_leftovers(home: Home) -> list[Path]:
    if not home.database_file.is_file():
        return find_leftovers(home, None)
    with open_database(home) as conn:
        return find_leftovers(home, conn)


def _check_leftovers(home: Home) -> Iterator[CheckResult]:
    if not home.root.is_dir() or find_lock_holder(home.lock_file) is not None:
        return  # a daemon's unfinished files are its own
    if found := _find_leftovers(home):
        files = f"{found[0]}" if len(found) == 1 else f"{len(found)} files, such as {found[0]}"
        detail = f"a crash has left {files}"
        yield CheckResult("leftovers", WARNING, detail, "kedit-daemon doctor --fix")
    else:
        yield CheckResult("leftovers", OK, "none")


def _check_home(home: Home) -> Iterator[CheckResult]:
    state_folders = (home.generations_folder, home.side_folder, home.index_folder)
    folders = (home.inbox_folder, home.state_folder, *state_folders)
    missing = [str(f) for f in (home.root, *folders) if not f.is_dir()]
    if missing:
        yield CheckResult("home", FAILED, f"there is no {missing[0]}", "kedit-daemon init")
        return
    closed = [str(f) for f in folders if not os.access(f, os.R_OK | os.W_OK | os.X_OK)]
    if closed:
        remedy = "run as the user that the daemon runs as, or change the folder's owner"
        yield CheckResult("home", FAILED, f"{closed[0]} may not be written to", remedy)
        return
    private = (home.root, home.state_folder, home.config_file)
    if writable := [path for path in private if _is_world_writable(path)]:
        detail = f"everybody may write to {writable[0]}"
        yield CheckResult("home", WARNING, detail, f"chmod o-w {writable[0]}")
    else:
        yield CheckResult("home", OK, str(home.root))


def _is_world_writable(path: Path) -> bool:
    return path.exists() and bool(path.stat().st_mode & stat.S_IWOTH)


def _check_config(home: Home, environ: Mapping[str, str]) -> Iterator[CheckResult]:
    from kedit_daemon.config import load_config

    config = load_config(home.root, environ)
    yield CheckResult("config", OK, str(home.config_file))
    yield from install.check_torch(config.device)
    yield from _check_model(config.model, home)


def _check_model(name: str, home: Home) -> Iterator[CheckResult]:
    try:
        from kedit_daemon.config import SHIPPED_MODEL
        from kedit_daemon.editing.gguf_cache import GgufCache
        from kedit_daemon.editing.model_location import check_model
    except ImportError as error:
        yield CheckResult("model", FAILED, f"cannot be loaded: {error}", REINSTALL)
        return
    try:
        folder = check_model(name, GgufCache(home.models_folder))
    except KeditError as error:
        remedy = REINSTALL if name == SHIPPED_MODEL else error.hint
        yield CheckResult("model", FAILED, str(error), remedy)
        return
    hub = f"{name}, an id on the hub: looked up when the daemon starts"
    yield CheckResult("model", OK, hub if folder is None else str(folder))


def _check_disk(home: Home) -> Iterator[CheckResult]:
    if not home.root.is_dir():
        return
    free = shutil.disk_usage(home.root).free
    outcome = FAILED if free < CRITICAL_BYTES else WARNING if free < LOW_DISK_BYTES else OK
    remedy = "" if outcome == OK else f"free some space on the disk of {home.root}"
    yield CheckResult("disk", outcome, f"{free >> 20} MB free", remedy)


def _check_daemon(home: Home) -> Iterator[CheckResult]:
    pid = find_lock_holder(home.lock_file)
    if pid is None:
        yield CheckResult("daemon", WARNING, "not running", "kedit-daemon run")
    elif not home.socket_file.is_socket():
        remedy = "wait until it has started, then look at its log"
        yield CheckResult("daemon", WARNING, f"pid {pid} takes no commands yet", remedy)
    else:
        yield CheckResult("daemon", OK, f"running, pid {pid}")


def _check_database(home: Home) -> Iterator[CheckResult]:
    from memory.db.queries import open_readonly
    from memory.db.schema import check_integrity

    if not home.database_file.is_file():
        yield CheckResult("database", OK, "none yet")
        return
    with closing(open_readonly(home.database_file)) as conn:
        check_integrity(conn, home.database_file, thorough=True)
    yield CheckResult("database", OK, str(home.database_file))


def _check_chain(home: Home) -> Iterator[CheckResult]:
    from memory.db import event_log
    from memory.db.queries import open_readonly

    if not home.database_file.is_file():
        return
    head = event_log.read_head(home.head_file)  # first: events may come while the chain is read
    with closing(open_readonly(home.database_file)) as conn:
        verdict = event_log.verify_chain(conn, head)
    if verdict.intact:
        yield CheckResult("chain", OK, f"{verdict.events} events")
    else:
        yield CheckResult("chain", FAILED, verdict.problem, BACKUP_REMEDY)


def _check_clock(home: Home, now: datetime) -> Iterator[CheckResult]:
    latest = _fetch_row(home, "SELECT at FROM events ORDER BY seq DESC LIMIT 1")
    text = now.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    if latest is not None and datetime.fromisoformat(latest[0]) > now + CLOCK_SLACK:
        remedy = "set the clock, or turn time synchronisation on"
        yield CheckResult("clock", WARNING, f"{text}, before the last event, {latest[0]}", remedy)
    else:
        yield CheckResult("clock", OK, text)


def _check_weights(home: Home) -> Iterator[CheckResult]:
    from memory.db import meta_keys
    from memory.files import hash_file, tensors_path

    if not home.database_file.is_file():
        return
    active = "SELECT CAST(value AS INTEGER) FROM meta WHERE key = ?"
    sql = f"SELECT id, sha256 FROM generations WHERE id = coalesce(({active}), 0)"
    row = _fetch_row(home, sql, meta_keys.ACTIVE_GENERATION)
    if row is None or row["sha256"] is None:
        yield CheckResult("weights", OK, "unedited")
        return
    path = tensors_path(home.generations_folder, row["sha256"])
    if path.is_file() and hash_file(path) == row["sha256"]:
        yield CheckResult("weights", OK, f"generation {row['id']}")
    else:
        state = "is damaged" if path.is_file() else "is missing"
        remedy = "restart the daemon: it solves that generation from the stored facts"
        yield CheckResult("weights", WARNING, f"{path} {state}", remedy)


def _fetch_row(home: Home, sql: str, *parameters: str) -> sqlite3.Row | None:
    """Return the first row of a query; None without one, or without a database."""
    from memory.db.queries import open_readonly

    if not home.database_file.is_file():
        return None
    with closing(open_readonly(home.database_file)) as conn:
        row: sqlite3.Row | None = conn.execute(sql, parameters).fetchone()
    return row


def _check_inbox(home: Home) -> Iterator[CheckResult]:
    if files := list_failed_files(home):
        remedy = f"kedit-daemon show {files[0]}"
        count = "1 file" if len(files) == 1 else f"{len(files)} files"
        yield CheckResult("inbox", WARNING, f"{count} in failed/", remedy)
    elif home.inbox_folder.is_dir():
        waiting = sum(1 for p in home.inbox_folder.iterdir() if p.is_file() and p.name[0] != ".")
        yield CheckResult("inbox", OK, "1 file waits" if waiting == 1 else f"{waiting} files wait")
