"""The disk that a home lies on: whether there is room on it, and what its errors mean to a person.

Imports nothing heavy, because `status` has to answer at once.
"""

import errno
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memory.errors import KeditError, damaged

FREE_BYTES = 64 << 20  # below it no work is taken
FREE_FILES = 100  # inodes
RETRY_SECONDS = 60.0  # before work is tried again that did not fit though so much was free
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL = "disk full"
DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
HINT = "free some space on the disk of {}"
BROKEN = (OSError, sqlite3.Error)
"""What a disk that fails makes Python raise."""


def lacking(folder: Path) -> str | None:
    """What the disk of a folder lacks for any work to be taken; None where there is room."""
    at = os.statvfs(folder)
    if at.f_bavail * at.f_frsize < FREE_BYTES:
        return FULL
    # Some file systems have no fixed number of files, and say 0 of 0.
    return f"{FULL}: no more files fit" if at.f_files and at.f_favail < FREE_FILES else None


def is_full(error: BaseException) -> bool:
    """Whether an error says that something did not fit; nothing else is amiss then."""
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
    return isinstance(error, OSError) and error.errno in NO_ROOM


def told(error: OSError | sqlite3.Error, folder: Path) -> KeditError:
    """The error of a disk in words, with a remedy; `folder` is what was worked on."""
    named = error.filename if isinstance(error, OSError) else None
    where = os.fsdecode(named) if isinstance(named, str | bytes) else str(folder)
    if is_full(error) or _unmapped(error):
        return KeditError(f"{where}: {FULL}", code="disk-full", hint=HINT.format(folder))
    if (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF in DAMAGED:
        return damaged(str(folder), str(error))
    what = error.strerror if isinstance(error, OSError) else None
    return KeditError(f"{where}: {what or error}", code="io", hint=_remedy(error, folder))


@contextmanager
def telling(folder: Path) -> Iterator[None]:
    """Errors of the disk within the block come as a KeditError."""
    try:
        yield
    except BROKEN as error:
        raise told(error, folder) from error


def _unmapped(error: OSError | sqlite3.Error) -> bool:
    """What SQLite makes of a full disk when it opens a database."""
    return getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_IOERR_SHMSIZE


def _remedy(error: OSError | sqlite3.Error, folder: Path) -> str:
    read_only = isinstance(error, OSError) and error.errno == errno.EROFS
    code = getattr(error, "sqlite_errorcode", None) or 0
    if read_only or code & 0xFF in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
        return f"see that {folder} can be written to: it may lie on a disk that is read-only now"
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM):
        return "run the command as the user that the daemon runs as"
    return "look for errors of the disk in the system's log (dmesg), then start again"
