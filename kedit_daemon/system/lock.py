"""One daemon a home: a flock, which the kernel releases at any death, with the pid inside."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memory.errors import KeditError

# A probe holds the lock for an instant, and a new holder has not written its pid for another:
# either is over long before these tries are.
TRIES = 10
PAUSE_SECONDS = 0.02


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
    except PermissionError as error:
        raise KeditError(
            f"{path} may not be opened by this user",
            code="no-permission",
            hint="run the command as the user that the daemon runs as",
        ) from error


def _pid(fd: int) -> int | None:
    text = os.pread(fd, 32, 0).strip()
    return int(text) if text.isdigit() else None


@contextmanager
def hold(path: Path) -> Iterator[None]:
    """Hold the lock for as long as the block runs; a KeditError that names the pid if it is held.

    The file stays behind: were it removed, two processes could lock two files of one name.
    """
    fd = _open(path, os.O_RDWR | os.O_CREAT)
    try:
        _take(fd, path)
        pid = b"%d\n" % os.getpid()
        os.pwrite(fd, pid, 0)
        os.ftruncate(fd, len(pid))
        yield
    finally:
        os.close(fd)


def _take(fd: int, path: Path) -> None:
    for _ in range(TRIES):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(PAUSE_SECONDS)
        else:
            return
    pid = _pid(fd)
    raise KeditError(
        f"another daemon, pid {pid}, holds {path}",
        code="busy",
        hint=f"stop it first (kill {pid}), or use another home",
        exit_code=75,
    )


def holder(path: Path) -> int | None:
    """The pid of the running daemon; None when nobody holds the lock, whatever the file says."""
    try:
        fd = _open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        for _ in range(TRIES):
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if pid := _pid(fd):
                    return pid
                time.sleep(PAUSE_SECONDS)
            else:
                return None
    finally:
        os.close(fd)
    raise KeditError(
        f"{path} is held by a process that wrote no pid into it",
        code="busy",
        hint=f"find that process with: fuser {path}",
        exit_code=75,
    )
