"""When the inbox is scanned: at intervals, sooner after a change, and files left behind first."""

import math
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import watchfiles

from kedit_daemon.config import Config
from kedit_daemon.daemon.stop_flag import StopFlag
from kedit_daemon.ingest.inbox import Inbox
from kedit_daemon.ingest.intake import Intake
from memory.db.store import Store


class InboxScanner:
    """Scans the inbox and takes its files in.

    The scan alone finds files; a change that the watcher reports only makes it come sooner.
    """

    def __init__(
        self,
        folder: Path,
        pictures_folder: Path,
        store: Store,
        config: Config,
        clock: Callable[[], datetime],
        monotonic: Callable[[], float],
    ) -> None:
        settings = config.inbox
        limits = (settings.settle_seconds, settings.max_bytes)
        self.inbox = Inbox(folder, *limits, clock, settings.unfinished_names)
        self.has_changed = True  # since the last scan, by the watcher's report
        self.has_claimed_files = True  # there may be claimed files that are not taken in yet
        self._intake = Intake(store, self.inbox, config, pictures_folder)
        self._store, self._monotonic = store, monotonic
        self._rescan_seconds, self._last_scan_at = settings.rescan_seconds, -math.inf

    def scan_if_due(self, poll_requests: Callable[[], None]) -> None:
        """Take in what is complete; `poll_requests` is called before each file.

        A file may take seconds, and there may be many.
        """
        if self.has_claimed_files:  # by the process before, or when the disk was full
            for claim in self.inbox.pending_claims():
                self._intake.take_file(claim)
            self.has_claimed_files = False
        now = self._monotonic()
        overdue = now - self._last_scan_at >= self._rescan_seconds
        if not (overdue or self.has_changed or self.inbox.settling_count):
            return
        self.has_changed, self._last_scan_at = False, now
        for claim in self.inbox.claim_files(now):
            poll_requests()
            self._intake.take_file(claim)
        self._record_refusals()

    def watch(self, stop_flag: StopFlag, report: Callable[[], None]) -> None:
        """Call `report` after each change of the folder, until `stop_flag` is set."""
        for _ in watchfiles.watch(
            self.inbox.folder, recursive=False, debounce=50, step=20, stop_event=stop_flag
        ):
            report()

    def _record_refusals(self) -> None:
        if refusals := self.inbox.take_refusals():
            with self._store.db.transaction():
                for entry in refusals:
                    self._store.db.write_event(
                        "file_refused", file=entry.name, problem=entry.problem, remedy=entry.remedy
                    )
