"""Whether somebody still writes a file, as far as the system tells."""

import fcntl
import signal


def known_closed(descriptor: int) -> bool:
    """Whether nobody has the file, which is open here for reading, open for writing.

    Linux grants a read lease only then, and only to the file's owner. False where it does not
    say: another owner, another system, or a file system without leases, as many over a network.
    """
    if not hasattr(fcntl, "F_SETLEASE"):
        return False
    try:
        # Whoever opens the file in this very moment breaks the lease. We would be told by SIGIO,
        # which ends a process; SIGURG does nothing.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError:
        return False
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return True
