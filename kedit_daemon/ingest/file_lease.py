"""Detects by file leases, and by /proc, whether a process still has a file open for writing."""

import errno
import fcntl
import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PROCESSES = "/proc"
MOUNT_TABLE = Path("/proc/self/mountinfo")
# File systems that only this kernel writes to. Over a network or FUSE others may.
LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "f2fs", "tmpfs", "overlay"}


def can_detect_closed(folder: Path) -> bool:
    """Check that leases can be relied on in a folder: on Linux, on a local file system."""
    if not hasattr(fcntl, "F_SETLEASE") or not MOUNT_TABLE.is_file():
        return False
    device = os.stat(folder).st_dev
    known = f"{os.major(device)}:{os.minor(device)}"
    mounts = [line.split() for line in MOUNT_TABLE.read_text(errors="replace").splitlines()]
    kinds = {fields[fields.index("-") + 1] for fields in mounts if fields[2] == known}
    return bool(kinds) and kinds <= LOCAL_FILE_SYSTEMS


def has_writer(descriptor: int, path: Path, *, leases: bool) -> bool | None:
    """Check that a process has a file open for writing; it is open here for reading, from `path`.

    None where that cannot be known: no `leases` can be relied on, or the file is another user's,
    and no process that /proc shows has it open. Those of other users it shows to root alone.
    """
    if leases and (known := _ask_lease(descriptor)) is not None:
        return known
    return True if _is_open_in_proc(descriptor, path) else None


def _ask_lease(descriptor: int) -> bool | None:
    """Linux grants a read lease only while nobody writes, and only to the file's owner."""
    try:
        # A process that opens the file just now breaks the lease. The signal would be SIGIO, which
        # ends a process; SIGURG does nothing.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return True if error.errno == errno.EAGAIN else None
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def _is_open_in_proc(descriptor: int, path: Path) -> bool:
    wanted = os.fstat(descriptor)
    for link in _iter_open_files():
        with suppress(OSError, ValueError):  # the process has ended, or it is another user's
            # The name first, which asks no other file system.
            if os.path.basename(os.readlink(link)) != path.name:
                continue
            found = os.stat(link)
            if (found.st_dev, found.st_ino) != (wanted.st_dev, wanted.st_ino):
                continue
            process, _, number = link.rpartition("/fd/")
            info = Path(f"{process}/fdinfo/{number}").read_text()
            flags = int(info.partition("flags:")[2].split()[0], 8)
            if flags & os.O_ACCMODE != os.O_RDONLY:
                return True
    return False


def _iter_open_files() -> Iterator[str]:
    with suppress(OSError):
        for process in os.listdir(PROCESSES):
            if process.isdecimal():
                with suppress(OSError):
                    folder = f"{PROCESSES}/{process}/fd"
                    yield from (f"{folder}/{number}" for number in os.listdir(folder))
