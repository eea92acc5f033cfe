"""Restores a backup to a home: everything is checked first, staged, then renamed."""

import os
import secrets
import shutil
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from kedit_daemon.home import FOLDER_MODE, Home
from kedit_daemon.maintenance.backup import Backup, check_backup, copy_file
from kedit_daemon.system.lock import find_lock_holder, hold_lock
from kedit_daemon.system.orphans import RESTORE_PREFIX
from memory.errors import KeditError, RestoreCutOff
from memory.files import sync_folder

BEFORE_PREFIX = "before-"  # with a time, after the name of what is moved aside


@dataclass(frozen=True)
class RestoreResult:
    """The backup that was restored, and what was moved aside for it."""

    backup: Backup
    moved_aside: tuple[Path, ...]


def check_restore(home: Home, source: Path, replace: bool) -> Backup:
    """Return the backup in `source` if it is intact and the home can take it; change nothing.

    Raises KeditError: it is not; a daemon holds the home (75); the home has a database, and
    `replace` is not set.
    """
    backup = check_backup(source.expanduser().absolute())
    if pid := find_lock_holder(home.lock_file):
        hint = f"stop it first (kill {pid}), or restore to another home"
        raise KeditError(f"a daemon, pid {pid}, holds {home.root}", code="busy", hint=hint)
    _check_replaceable(home, replace)
    return backup


def restore(home: Home, source: Path, replace: bool, now: datetime) -> RestoreResult:
    """Make the home what it was at the backup, and move what was there aside.

    The inbox stays as it is. Raises as `check_restore` does, and when it cannot write.
    """
    backup = check_restore(home, source, replace)
    home.create_folders()
    with hold_lock(home.lock_file):
        _check_replaceable(home, replace)
        for leftover in home.root.glob(f"{RESTORE_PREFIX}*"):  # of a restore that was killed
            shutil.rmtree(leftover)
        staged = Home(home.root / f"{RESTORE_PREFIX}{secrets.token_hex(8)}")
        try:
            _fill_staged(staged, backup)
            # The lock is one file in both folders: it is held without a gap.
            os.link(home.lock_file, staged.lock_file)
            aside = _swap_folders(home, staged, now)
        except OSError as error:
            raise KeditError(
                f"cannot restore to {home.root}: {error.strerror or error}",
                code="restore",
                hint="restore as the user that the daemon runs as, on a disk with free space",
            ) from error
        finally:
            shutil.rmtree(staged.root, ignore_errors=True)
    return RestoreResult(backup, aside)


def refuse_unfinished_restore(home: Home) -> None:
    """Raise RestoreCutOff if there is no database but files that a restore has left.

    A daemon that started there would have no facts. Only a restore that runs to its end changes
    this, by the database: one that fails leaves an empty `state`, and has removed what was staged.
    """
    if home.database_file.exists():
        return
    moved = home.root.glob(f"{home.state_folder.name}.{BEFORE_PREFIX}*")
    staged = home.root.glob(f"{RESTORE_PREFIX}*")
    if leftovers := sorted(path.name for path in (*moved, *staged) if path.is_dir()):
        raise RestoreCutOff(
            f"a restore to {home.root} was cut off",
            hint="run `kedit-daemon restore SOURCE` again; "
            f"to begin without its facts, first move {', '.join(leftovers)} out of the home",
        )


def _check_replaceable(home: Home, replace: bool) -> None:
    if home.database_file.exists() and not replace:
        hint = "restore to another home (--home DIR), or move what is there aside with --replace"
        raise KeditError(f"{home.root} has a database already", code="exists", hint=hint)


def _fill_staged(staged: Home, backup: Backup) -> None:
    tensors = staged.generations_folder, staged.side_folder, staged.index_folder
    folders = (*tensors, staged.pictures_folder)
    for folder in (staged.root, staged.state_folder, *folders):
        folder.mkdir(FOLDER_MODE)
    for name, sha in backup.manifest["files"].items():
        if copy_file(backup.path / name, staged.root / name) != sha:
            raise KeditError(f"{name} has changed while it was copied", code="corrupt")
    for folder in (*folders, staged.state_folder):
        sync_folder(folder)


def _swap_folders(home: Home, staged: Home, now: datetime) -> tuple[Path, ...]:
    """Put what is staged in its place, `state` last; return the paths of what was moved aside."""
    stamp = now.astimezone(UTC).strftime(f"{BEFORE_PREFIX}%Y%m%dT%H%M%SZ")
    aside = []
    for new, old in (
        (staged.config_file, home.config_file),
        (staged.review_file, home.review_file),
    ):
        if not new.exists():
            continue
        if old.exists() and old.read_bytes() != new.read_bytes():
            aside.append(old.rename(old.with_name(f"{old.name}.{stamp}")))
        new.replace(old)
    before = home.state_folder.rename(home.state_folder.with_name(f"state.{stamp}"))
    try:
        staged.state_folder.rename(home.state_folder)
    except OSError:
        with suppress(OSError):  # a daemon that started just now has made a state of its own
            before.rename(home.state_folder)
        raise
    sync_folder(home.root)
    if {p.name for p in before.rglob("*") if not p.is_dir()} <= {home.lock_file.name}:
        shutil.rmtree(before)  # it has only the folders of a home that was never used
        return tuple(aside)
    return (*aside, before)
