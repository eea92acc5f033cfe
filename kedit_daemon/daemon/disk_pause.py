"""Pauses all work while the disk is full; questions are answered meanwhile."""

import logging
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kedit_daemon.system.backoff import Backoff
from kedit_daemon.system.disk import (
    DISK_FULL,
    FREE_SPACE_HINT,
    MIN_FREE_BYTES,
    find_disk_shortage,
    is_disk_full,
    measure_free_bytes,
)
from kedit_daemon.system.sd_notify import SystemdNotifier
from memory.db import meta_keys
from memory.db.store import Store
from memory.errors import KeditError, WorkPaused

DISK_CHECK_SECONDS = 10.0  # between two checks for the space that a start needs
# Asked of systemd again at each check: the unit's TimeoutStartSec.
START_TIMEOUT_SECONDS = 900.0
RETRY_SECONDS, MAX_RETRY_SECONDS = 60.0, 3600.0
log = logging.getLogger(__name__)


class DiskPause:
    """Decides whether work is taken, by the free space on the disk of a folder."""

    def __init__(self, store: Store, folder: Path, monotonic: Callable[[], float]) -> None:
        self.store, self.folder = store, folder
        self.reason: str | None = None
        self._backoff = Backoff(RETRY_SECONDS, MAX_RETRY_SECONDS, monotonic)
        self._free_bytes_when_full = 0  # at the last write that did not fit

    def check_disk(self) -> bool:
        """Return whether work is paused now."""
        why = find_disk_shortage(self.folder)
        if why is None and not self._backoff.is_due() and not self._has_more_space():
            why = self.reason
        if why is not None:
            self._record_reason(why)
        return why is not None

    def record_success(self) -> None:
        """End the pause: a turn has done its work, so everything fits."""
        self._backoff.reset()
        self._record_reason(None)

    def record_disk_full(self, error: BaseException) -> None:
        """Pause: a write did not fit, whatever space there seemed to be."""
        log.warning("Pausing all work, the disk is full: %s", error)
        self._backoff.record_failure()
        self._free_bytes_when_full = measure_free_bytes(self.folder)
        self._record_reason(find_disk_shortage(self.folder) or DISK_FULL)

    def make_refusal(self) -> KeditError | None:
        """Make the error for requests of work; None when there is no pause."""
        if self.reason is None:
            return None
        hint = f"{FREE_SPACE_HINT.format(self.folder)}; the daemon goes on by itself"
        return WorkPaused(f"paused: {self.reason}", hint=hint)

    def _has_more_space(self) -> bool:
        """Check that space has been freed since."""
        return measure_free_bytes(self.folder) >= self._free_bytes_when_full + MIN_FREE_BYTES

    def _record_reason(self, why: str | None) -> None:
        self.reason = why
        if why == self.store.db.get_meta(meta_keys.PAUSED):
            return
        # If this does not fit either, `status` looks at the disk by itself.
        with ignore_disk_full(self.folder), self.store.db.transaction():
            self.store.db.set_meta(meta_keys.PAUSED, why)
            self.store.db.write_event("paused" if why else "resumed", reason=why)


def wait_for_disk_space(folder: Path, notifier: SystemdNotifier) -> bool:
    """Wait until the disk has space for a start; False when a signal stops it meanwhile.

    A process that ended instead would be restarted by systemd a few times, and then never again.
    """
    stops = (signal.SIGTERM, signal.SIGINT)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    waited = False
    try:
        while (why := find_disk_shortage(folder)) is not None:
            if not waited:
                log.warning("Waiting for disk space to start: %s in %s", why, folder)
            waited = True
            notifier.send_status(f"paused: {why}")
            notifier.extend_timeout(START_TIMEOUT_SECONDS)
            if signal.sigtimedwait(stops, DISK_CHECK_SECONDS) is not None:
                return False
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if waited:
        notifier.send_status("")
    return True


@contextmanager
def ignore_disk_full(folder: Path) -> Iterator[None]:
    """Leave the block unfinished, with a warning, when the disk of the folder is full."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        if not is_disk_full(error, folder):
            raise
        log.warning("The disk is full: %s", error)
