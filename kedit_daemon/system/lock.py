"""The lock of a home: a flock, which the kernel releases when the process dies, with its pid."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memory.errors import KeditError

# A probe holds the lock for an instant, and a new holder needs another to write its pid: these
# tries outlast both by far.
LOCK_TRIES = 10
LOCK_RETRY_SECONDS = 0.02


def _open_lock_file(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    except PermissionError as error:
        raise KeditError(
            f"{path} may not be opened by this user",
            code="no-permission",
            hint="run the command as the user that the daemon runs as",
        ) from error


def _read_pid(fd: int) -> int | None:
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else None


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold the lock while the block runs. Raises KeditError, with the pid, if another has it.

    The file is left: were it removed, two processes could lock two files of the same name.
    """
    fd = _open_lock_file(path, os.O_RDWR | os.O_CREAT)
    try:
        _acquire_lock(fd, path)
        pid = b"%d\n" % os.getpid()
        os.pwrite(fd, pid, 0)
        os.ftruncate(fd, len(pid))
        yield
    finally:
        os.close(fd)


def _acquire_lock(fd: int, path: Path) -> None:
    for _ in range(LOCK_TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(LOCK_RETRY_SECONDS)
        else:
            return
    pid = _read_pid(fd)
    raise KeditError(
        f"another daemon, pid {pid}, holds {path}",
        code="busy",
        hint=f"stop it first (kill {pid}), or use another home",
    )


def find_lock_holder(path: Path) -> int | None:
    """Return the pid of the running daemon; None when nobody holds the lock."""
    try:
        fd = _open_lock_file(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        for _ in range(LOCK_TRIES):
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if pid := _read_pid(fd):
                    return pid
                time.sleep(LOCK_RETRY_SECONDS)
            else:
                return None
    finally:
        os.close(fd)
    raise KeditError(
        f"{path} is held by a process that wrote no pid into it",
        code="busy",
        hint=f"find that process with: fuser {path}",
    )
