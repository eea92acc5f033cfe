"""The disk that a home lies on: whether there is room on it, and what its errors mean to a person.

Imports nothing heavy, because `status` has to answer at once.
"""

import errno
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memory.errors import Damaged, KeditError

MIN_FREE_BYTES = 64 << 20  # below it no work is taken
MIN_FREE_FILES = 100  # inodes
NO_SPACE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DISK_FULL = "disk full"
DAMAGE_CODES = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
FREE_SPACE_HINT = "free some space on the disk of {}"
FAILURE_CODES = (
    *(sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN),
    *DAMAGE_CODES,
)
LOCKED_CODES = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
PROBE_BYTES = 1 << 20  # more than what SQLite writes at once


def measure_free_bytes(folder: Path) -> int:
    """How many bytes anybody may still write to the disk of a folder."""
    at = os.statvfs(folder)
    return at.f_bavail * at.f_frsize


def find_disk_shortage(folder: Path) -> str | None:
    """What the disk of a folder lacks for any work to be taken; None where there is room."""
    if measure_free_bytes(folder) < MIN_FREE_BYTES:
        return DISK_FULL
    at = os.statvfs(folder)
    # Some file systems have no fixed number of files, and say 0 of 0.
    return (
        f"{DISK_FULL}: no more files fit" if at.f_files and at.f_favail < MIN_FREE_FILES else None
    )


def is_disk_full(error: BaseException, folder: Path | None = None) -> bool:
    """Whether an error says that something did not fit; nothing else is amiss then. SQLite keeps
    to itself that a quota or a limit was met: where the folder of the database is given, a write
    there is tried."""
    if not isinstance(error, sqlite3.Error):
        return isinstance(error, OSError) and error.errno in NO_SPACE_ERRNOS
    code = _sqlite_code(error)
    # The second is how a full disk ends the opening of a database.
    if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE):
        return True
    # Nothing is tried again over a sync that failed, whatever the reason.
    tried = code & 0xFF == sqlite3.SQLITE_IOERR and code != sqlite3.SQLITE_IOERR_FSYNC
    return tried and folder is not None and _rejects_writes(folder)


def is_database_locked(error: BaseException) -> bool:
    """Whether somebody else has had the database to himself for too long; it is whole."""
    return isinstance(error, sqlite3.Error) and _sqlite_code(error) & 0xFF in LOCKED_CODES


def is_disk_failure(error: BaseException) -> bool:
    """Whether the disk fails, or is full: an error that does not belong to what met it."""
    if isinstance(error, sqlite3.Error):
        return _sqlite_code(error) & 0xFF in FAILURE_CODES
    return isinstance(error, OSError) and error.errno in (errno.EIO, errno.EROFS, *NO_SPACE_ERRNOS)


def describe_disk_error(error: BaseException, folder: Path) -> KeditError | None:
    """The error of a disk in words, with a remedy; `folder` is what was worked on. None for all
    that is no disk's fault."""
    named = error.filename if isinstance(error, OSError) else None
    where = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else None
    if is_disk_full(error, folder):
        hint = FREE_SPACE_HINT.format(where.parent if where else folder)
        return KeditError(f"{where or folder}: {DISK_FULL}", code="disk-full", hint=hint)
    if is_database_locked(error):
        return KeditError(
            f"{folder}: {error}, by another process, for too long",
            code="busy",
            hint="try again; if it stays so, see who has the database open (fuser)",
        )
    if _sqlite_code(error) & 0xFF in DAMAGE_CODES:
        return Damaged(str(folder), str(error))
    if not (is_disk_failure(error) or isinstance(error, PermissionError)):
        return None
    what = error.strerror if isinstance(error, OSError) else None
    return KeditError(
        f"{where or folder}: {what or error}", code="io", hint=_suggest_remedy(error, folder)
    )


@contextmanager
def translate_disk_errors(folder: Path) -> Iterator[None]:
    """Errors of the disk within the block come as a KeditError."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        known = describe_disk_error(error, folder)
        if known is None:
            raise
        raise known from error


def _sqlite_code(error: BaseException) -> int:
    """What SQLite calls it; 0 where it is none of SQLite's, or Python's own."""
    return getattr(error, "sqlite_errorcode", None) or 0


def _rejects_writes(folder: Path) -> bool:
    """Whether a file in a folder has no room where the longest of them ends."""
    try:
        end = max((path.stat().st_size for path in folder.iterdir()), default=0)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.seek(end)
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fdatasync(file.fileno())
    except OSError as error:
        return error.errno in NO_SPACE_ERRNOS
    return False


def _suggest_remedy(error: BaseException, folder: Path) -> str:
    read_only = isinstance(error, OSError) and error.errno == errno.EROFS
    if read_only or _sqlite_code(error) & 0xFF in (
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_CANTOPEN,
    ):
        return f"see that {folder} can be written to: it may lie on a disk that is read-only now"
    if isinstance(error, PermissionError):
        return "run the command as the user that the daemon runs as"
    return "look for errors of the disk in the system's log (dmesg), then start again"
