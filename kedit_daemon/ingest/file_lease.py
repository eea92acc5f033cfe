"""Detects by file leases whether another process still has a file open for writing."""

import fcntl
import os
import signal
from pathlib import Path

MOUNT_TABLE = Path("/proc/self/mountinfo")
# File systems that only this kernel writes to. Over a network or FUSE others may.
LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "f2fs", "tmpfs", "overlay"}


def can_detect_closed(folder: Path) -> bool:
    """Check that `is_closed` can be relied on in a folder: on Linux, on a local file system."""
    if not hasattr(fcntl, "F_SETLEASE") or not MOUNT_TABLE.is_file():
        return False
    device = os.stat(folder).st_dev
    known = f"{os.major(device)}:{os.minor(device)}"
    mounts = [line.split() for line in MOUNT_TABLE.read_text(errors="replace").splitlines()]
    kinds = {fields[fields.index("-") + 1] for fields in mounts if fields[2] == known}
    return bool(kinds) and kinds <= LOCAL_FILE_SYSTEMS


def is_closed(descriptor: int) -> bool:
    """Check that nobody has a file open for writing; it is open here for reading.

    Linux grants a read lease only then, and only to the file's owner. False if it grants none.
    """
    try:
        # A process that opens the file just now breaks the lease. The signal would be SIGIO, which
        # ends a process; SIGURG does nothing.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True
