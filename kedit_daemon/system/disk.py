"""The disk of a home: its free space, and its errors in words with remedies.

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

MIN_FREE_BYTES = 64 << 20  # with less no work is accepted
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
PROBE_BYTES = 1 << 20  # more than SQLite writes at once


def measure_free_bytes(folder: Path) -> int:
    """Return the bytes that an ordinary user may still write to the disk of a folder."""
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize


def find_disk_shortage(folder: Path) -> str | None:
    """Return the reason why the disk is too full for any work; None where it has space."""
    if measure_free_bytes(folder) < MIN_FREE_BYTES:
        return DISK_FULL
    stats = os.statvfs(folder)
    # File systems without a fixed number of files report 0 of 0.
    has_files = not stats.f_files or stats.f_favail >= MIN_FREE_FILES
    return None if has_files else f"{DISK_FULL}: no more files fit"


def is_disk_full(error: BaseException, folder: Path | None = None) -> bool:
    """Check that an error means a full disk and nothing else.

    SQLite does not report that a quota or a limit was hit: where the folder of the database is
    given, a write there is tried.
    """
    if not isinstance(error, sqlite3.Error):
        return isinstance(error, OSError) and error.errno in NO_SPACE_ERRNOS
    code = _sqlite_code(error)
    # The second is the error of opening a database on a full disk, and seldom of a failing one.
    if code == sqlite3.SQLITE_FULL or (code == sqlite3.SQLITE_IOERR_SHMSIZE and folder is None):
        return True
    # After a failed sync nothing is tried again, whatever the reason.
    may_be_full = code & 0xFF == sqlite3.SQLITE_IOERR and code != sqlite3.SQLITE_IOERR_FSYNC
    return may_be_full and folder is not None and _rejects_writes(folder)


def is_database_locked(error: BaseException) -> bool:
    """Check that another process has kept the database locked for too long."""
    return isinstance(error, sqlite3.Error) and _sqlite_code(error) & 0xFF in LOCKED_CODES


def is_disk_failure(error: BaseException) -> bool:
    """Check that the disk fails or is full, which is no fault of the work at hand."""
    if isinstance(error, sqlite3.Error):
        return _sqlite_code(error) & 0xFF in FAILURE_CODES
    return isinstance(error, OSError) and error.errno in (errno.EIO, errno.EROFS, *NO_SPACE_ERRNOS)


def describe_disk_error(error: BaseException, folder: Path) -> KeditError | None:
    """Return the error of a disk in words, with a remedy; None for all other errors.

    `folder` is the folder that was worked on.
    """
    name = error.filename if isinstance(error, OSError) else None
    path = Path(os.fsdecode(name)) if isinstance(name, str | bytes) else None
    if is_disk_full(error, folder):
        hint = FREE_SPACE_HINT.format(path.parent if path else folder)
        return KeditError(f"{path or folder}: {DISK_FULL}", code="disk-full", hint=hint)
    if is_database_locked(error):
        return KeditError(
            f"{folder}: {error}, by another process, for too long",
            code="busy",
            hint="try again; if it persists, find out which process has the database open (fuser)",
        )
    if _sqlite_code(error) & 0xFF in DAMAGE_CODES:
        return Damaged(str(folder), str(error))
    if not (is_disk_failure(error) or isinstance(error, PermissionError)):
        return None
    reason = error.strerror if isinstance(error, OSError) else None
    problem = f"{path or folder}: {reason or error}"
    return KeditError(problem, code="io", hint=_suggest_remedy(error, folder))


@contextmanager
def translate_disk_errors(folder: Path) -> Iterator[None]:
    """Raise the disk's errors within the block as a KeditError."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        known = describe_disk_error(error, folder)
        if known is None:
            raise
        raise known from error


def _sqlite_code(error: BaseException) -> int:
    """Return SQLite's code of an error; 0 where it has none."""
    return getattr(error, "sqlite_errorcode", None) or 0


def _rejects_writes(folder: Path) -> bool:
    """Check that a file in a folder cannot grow beyond the longest of them."""
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
    code = _sqlite_code(error) & 0xFF
    if read_only or code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
        return f"make {folder} writable: its disk may be read-only now"
    if isinstance(error, PermissionError):
        return "run the command as the user that the daemon runs as"
    return "look for errors of the disk in the system's log (dmesg), then start again"
