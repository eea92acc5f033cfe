"""Whether somebody still writes a file, as far as the system tells."""

import fcntl
import os
import signal
from pathlib import Path

MOUNT_TABLE = Path("/proc/self/mountinfo")
# Where all who write a file do so through this very kernel. Over a network or FUSE others may.
LOCAL_FILE_SYSTEMS = {"ext2", "ext3", "ext4", "xfs", "f2fs", "tmpfs", "overlay"}


def can_detect_closed(folder: Path) -> bool:
    """Whether `known_closed` is to be believed of the files in a folder: Linux, a local file
    system."""
    if not hasattr(fcntl, "F_SETLEASE") or not MOUNT_TABLE.is_file():
        return False
    device = os.stat(folder).st_dev
    known = f"{os.major(device)}:{os.minor(device)}"
    mounts = [line.split() for line in MOUNT_TABLE.read_text(errors="replace").splitlines()]
    kinds = {fields[fields.index("-") + 1] for fields in mounts if fields[2] == known}
    return bool(kinds) and kinds <= LOCAL_FILE_SYSTEMS


def is_closed(descriptor: int) -> bool:
    """Whether nobody has the file, which is open here for reading, open for writing: Linux grants
    a read lease only then, and only to the file's owner. False where it grants none."""
    try:
        # Whoever opens the file in this very moment breaks the lease. We would be told by SIGIO,
        # which ends a process; SIGURG does nothing.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True
