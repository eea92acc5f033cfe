"""Checks of the installation and of a home; what fails names its remedy.

It changes nothing but what `fix` is asked to, and works whether the daemon runs or not.
"""

import os
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

from kedit_daemon.cli.context import database
from kedit_daemon.home import Home
from kedit_daemon.ingest.failed_files import failed_files
from kedit_daemon.maintenance import doctor_install as install
from kedit_daemon.maintenance.doctor_install import FAILED, OK, REINSTALL, WARNING, Check
from kedit_daemon.report.warnings import FREE_BYTES
from kedit_daemon.system.orphans import leftovers, remove
from memory.errors import KeditError

FEW_BYTES = 50 << 20
CLOCK_SLACK = timedelta(minutes=5)
BACKUP = "keep a copy of state/ as it is, then put a backup back"


def examine(home: Home, environ: Mapping[str, str], now: datetime) -> Iterator[Check]:
    """All checks, as they are done."""
    looks: dict[str, Callable[[], Iterator[Check]]] = {
        "python": install.python,
        "packages": install.packages,
        "faiss": install.faiss,
        "sqlite": install.sqlite,
        "extras": lambda: install.extras(home, environ),
        "unit": install.unit,
        "home": lambda: _home(home),
        "config": lambda: _config(home, environ),
        "disk": lambda: _disk(home),
        "daemon": lambda: _daemon(home),
        "database": lambda: _database(home),
        "chain": lambda: _chain(home),
        "clock": lambda: _clock(home, now),
        "weights": lambda: _weights(home),
        "leftovers": lambda: _leftovers(home),
        "inbox": lambda: _inbox(home),
    }
    for name, look in looks.items():
        try:
            yield from look()
        except KeditError as error:
            remedy = BACKUP if error.code == "unreadable" else error.hint
            yield Check(name, FAILED, str(error), remedy)
        except sqlite3.Error as error:
            yield Check(name, FAILED, f"{home.database}: {error}", BACKUP)
        except OSError as error:
            yield Check(name, FAILED, str(error), "run as the user that the daemon runs as")


def fix(home: Home) -> list[Path]:
    """Take away what a crash has left; what it was.

    Raises KeditError: a daemon holds the home (75), or something cannot be taken away.
    """
    if not home.state.is_dir():
        return []
    from kedit_daemon.system.lock import hold

    with hold(home.lock):
        found = _left(home)
        try:
            remove(found)
        except OSError as error:
            raise KeditError(
                f"{error.filename} cannot be taken away: {error.strerror}",
                code="no-permission",
                hint="run as the user that the daemon runs as",
            ) from error
    return found


def _left(home: Home) -> list[Path]:
    if not home.database.is_file():
        return leftovers(home, None)
    with database(home) as conn:
        return leftovers(home, conn)


def _leftovers(home: Home) -> Iterator[Check]:
    from kedit_daemon.system.lock import holder

    if not home.root.is_dir() or holder(home.lock) is not None:
        return  # a daemon's unfinished files are its own
    if found := _left(home):
        files = f"{found[0]}" if len(found) == 1 else f"{len(found)} files, as {found[0]}"
        yield Check("leftovers", WARNING, f"a crash has left {files}", "kedit-daemon doctor --fix")
    else:
        yield Check("leftovers", OK, "none")


def _home(home: Home) -> Iterator[Check]:
    made = "kedit-daemon init"
    folders = (home.inbox, home.state, home.generations, home.side, home.index)
    missing = [str(f) for f in (home.root, *folders) if not f.is_dir()]
    if missing:
        yield Check("home", FAILED, f"there is no {missing[0]}", made)
        return
    closed = [str(f) for f in folders if not os.access(f, os.R_OK | os.W_OK | os.X_OK)]
    if closed:
        remedy = "run as the user that the daemon runs as, or change the folder's owner"
        yield Check("home", FAILED, f"{closed[0]} may not be written to", remedy)
    elif open_to_all := [f for f in (home.root, home.state, home.config) if _world_writable(f)]:
        remedy = f"chmod o-w {open_to_all[0]}"
        yield Check("home", WARNING, f"everybody may write to {open_to_all[0]}", remedy)
    else:
        yield Check("home", OK, str(home.root))


def _world_writable(path: Path) -> bool:
    return path.exists() and bool(path.stat().st_mode & stat.S_IWOTH)


def _config(home: Home, environ: Mapping[str, str]) -> Iterator[Check]:
    from kedit_daemon.config import load

    config = load(home.root, environ)
    yield Check("config", OK, str(home.config))
    yield from install.torch_and_gpu(config.device)
    yield from _model(config.model)


def _model(name: str) -> Iterator[Check]:
    try:
        from kedit_daemon.editing.model_loading import model_path
    except ImportError as error:
        yield Check("model", FAILED, f"cannot be loaded: {error}", REINSTALL)
        return
    path = model_path(name)
    shipped = path != Path(name)
    if not shipped and not path.is_absolute() and not path.is_dir():
        yield Check("model", OK, f"{name}, an id on the hub: looked for when the daemon starts")
        return
    remedy = REINSTALL if shipped else "set `model` in config.toml to a folder with a model"
    missing = [f for f in ("config.json", "tokenizer_config.json") if not (path / f).is_file()]
    if missing or not any(path.glob("*.safetensors")):
        lacks = missing[0] if missing else "*.safetensors"
        yield Check("model", FAILED, f"{path} lacks {lacks}", remedy)
    else:
        yield Check("model", OK, str(path))


def _disk(home: Home) -> Iterator[Check]:
    if not home.root.is_dir():
        return
    free = shutil.disk_usage(home.root).free
    outcome = FAILED if free < FEW_BYTES else WARNING if free < FREE_BYTES else OK
    remedy = "" if outcome == OK else f"free some space on the disk of {home.root}"
    yield Check("disk", outcome, f"{free >> 20} MB free", remedy)


def _daemon(home: Home) -> Iterator[Check]:
    from kedit_daemon.system.lock import holder

    pid = holder(home.lock)
    if pid is None:
        yield Check("daemon", WARNING, "not running", "kedit-daemon run")
    elif not home.socket.is_socket():
        remedy = "wait for it to have started, then look at its log"
        yield Check("daemon", WARNING, f"pid {pid} takes no commands yet", remedy)
    else:
        yield Check("daemon", OK, f"running, pid {pid}")


def _database(home: Home) -> Iterator[Check]:
    from memory.db.queries import open_readonly
    from memory.db.schema import check

    if not home.database.is_file():
        yield Check("database", OK, "none yet")
        return
    with closing(open_readonly(home.database)) as conn:
        check(conn, home.database, thorough=True)
    yield Check("database", OK, str(home.database))


def _chain(home: Home) -> Iterator[Check]:
    from memory.db import event_log
    from memory.db.queries import open_readonly

    if not home.database.is_file():
        return
    head = event_log.read_head(home.head)  # first: events may come while the chain is walked
    with closing(open_readonly(home.database)) as conn:
        verdict = event_log.verify(conn, head)
    if verdict.intact:
        yield Check("chain", OK, f"{verdict.events} events")
    else:
        yield Check("chain", FAILED, verdict.problem, BACKUP)


def _clock(home: Home, now: datetime) -> Iterator[Check]:
    from memory.db.queries import open_readonly

    latest = None
    if home.database.is_file():
        with closing(open_readonly(home.database)) as conn:
            latest = conn.execute("SELECT at FROM events ORDER BY seq DESC LIMIT 1").fetchone()
    text = now.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    if latest is not None and datetime.fromisoformat(latest[0]) > now + CLOCK_SLACK:
        remedy = "set the clock, or turn time synchronisation on"
        yield Check("clock", WARNING, f"{text}, before the last event, {latest[0]}", remedy)
    else:
        yield Check("clock", OK, text)


def _weights(home: Home) -> Iterator[Check]:
    from memory.db.queries import open_readonly
    from memory.files import sha256_of, tensors_path

    if not home.database.is_file():
        return
    with closing(open_readonly(home.database)) as conn:
        row = conn.execute(
            "SELECT id, sha256 FROM generations WHERE id = coalesce((SELECT CAST(value AS INTEGER)"
            " FROM meta WHERE key = 'active_generation'), 0)"
        ).fetchone()
    if row is None or row["sha256"] is None:
        yield Check("weights", OK, "unedited")
        return
    path = tensors_path(home.generations, row["sha256"])
    if path.is_file() and sha256_of(path) == row["sha256"]:
        yield Check("weights", OK, f"generation {row['id']}")
    else:
        what = "is damaged" if path.is_file() else "is missing"
        remedy = "start the daemon again: it solves that generation from the stored facts"
        yield Check("weights", WARNING, f"{path} {what}", remedy)


def _inbox(home: Home) -> Iterator[Check]:
    if files := failed_files(home):
        remedy = f"kedit-daemon show {files[0]}"
        count = "1 file" if len(files) == 1 else f"{len(files)} files"
        yield Check("inbox", WARNING, f"{count} in failed/", remedy)
    elif home.inbox.is_dir():
        waiting = sum(1 for p in home.inbox.iterdir() if p.is_file() and p.name[0] != ".")
        yield Check("inbox", OK, "1 file waits" if waiting == 1 else f"{waiting} files wait")
