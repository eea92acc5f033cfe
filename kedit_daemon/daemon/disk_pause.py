"""Taking no work while the disk is full. Who waits is answered all the same."""

import logging
import math
import signal
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kedit_daemon.system.disk import FREE_BYTES, FULL, HINT, free, is_full, lacking
from kedit_daemon.system.sd_notify import Notifier
from memory.db.store import Store
from memory.errors import KeditError

LOOK_SECONDS = 10.0  # between two looks for the room that a start takes
LOADING_SECONDS = 900.0  # what systemd is asked for, again and again: the unit's TimeoutStartSec
RETRY_SECONDS, LONGEST_RETRY_SECONDS = 60.0, 3600.0
PAUSED = "paused"  # in the store's meta: why no work is taken
log = logging.getLogger(__name__)


class Pause:
    """Whether work is taken, by what the disk of a folder has room for."""

    def __init__(self, store: Store, folder: Path, monotonic: Callable[[], float]) -> None:
        self.store, self.folder, self.monotonic = store, folder, monotonic
        self.why: str | None = None
        self._wait = 0.0  # seconds before work that did not fit is tried again
        self._again = -math.inf  # when that is
        self._free = 0  # bytes that there were when it did not fit

    def look(self) -> bool:
        """Whether no work is to be taken now."""
        why = lacking(self.folder)
        if why is None and self.monotonic() < self._again and not self._roomier():
            why = self.why
        if why is not None:
            self._note(why)
        return why is not None

    def worked(self) -> None:
        """A turn has done its work, so everything fits."""
        self._wait, self._again = 0.0, -math.inf
        self._note(None)

    def ran_out(self, error: BaseException) -> None:
        """Something did not fit, however much room there seemed to be."""
        log.warning("no work is taken, since something did not fit: %s", error)
        self._wait = min(2 * self._wait or RETRY_SECONDS, LONGEST_RETRY_SECONDS)
        self._again, self._free = self.monotonic() + self._wait, free(self.folder)
        self._note(lacking(self.folder) or FULL)

    def refusal(self) -> KeditError | None:
        """What is said to those who ask for work, if there is none."""
        if self.why is None:
            return None
        hint = f"{HINT.format(self.folder)}; the daemon goes on by itself"
        return KeditError(f"paused: {self.why}", code="disk-full", hint=hint, exit_code=75)

    def _roomier(self) -> bool:
        """Whether somebody has made room since."""
        return free(self.folder) >= self._free + FREE_BYTES

    def _note(self, why: str | None) -> None:
        self.why = why
        if why == self.store.meta(PAUSED):
            return
        # Where it does not fit, `status` looks at the disk for itself.
        with where_it_fits(self.folder), self.store.transaction():
            self.store.set_meta(PAUSED, why)
            self.store.event("paused" if why else "resumed", reason=why)


def wait_for_room(folder: Path, notifier: Notifier) -> bool:
    """Before the start, where there is no room for it; False if told to stop meanwhile. Were it to
    end instead, systemd would try a few times and then never again."""
    stops = (signal.SIGTERM, signal.SIGINT)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, stops)
    waited = False
    try:
        while (why := lacking(folder)) is not None:
            if not waited:
                log.warning("the start waits for room: %s in %s", why, folder)
            waited = True
            notifier.status(f"paused: {why}")
            notifier.extend(LOADING_SECONDS)
            if signal.sigtimedwait(stops, LOOK_SECONDS) is not None:
                return False
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if waited:
        notifier.status("")
    return True


@contextmanager
def where_it_fits(folder: Path) -> Iterator[None]:
    """What is done within may be left undone where the disk of the folder is full."""
    try:
        yield
    except (OSError, sqlite3.Error) as error:
        if not is_full(error, folder):
            raise
        log.warning("the disk is full: %s", error)
