"""Watches the files of a folder until their writers have finished them."""

import os
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

from kedit_daemon.ingest.file_lease import can_detect_closed, has_writer
from kedit_daemon.ingest.plain_files import open_plain_file
from memory.errors import KeditError

SETTLING_SECONDS = 60.0  # after which an unchanged file that is held open is looked at less often


FileMark = tuple[int, int, int]
"""The inode, size and time of change of a file: while they are the same, so is its content."""


def mark_of(found: os.stat_result) -> FileMark:
    """Return the mark of a file."""
    return found.st_ino, found.st_size, found.st_mtime_ns


class CompletionWatch:
    """Finds the files of a folder that are complete.

    One that a process has open for writing is not, however long that pauses. Where that cannot be
    known, a file is complete when it has stood still for `settle_seconds` before our eyes.
    """

    def __init__(self, folder: Path, settle_seconds: float, clock: Callable[[], datetime]) -> None:
        self.folder, self.settle_seconds, self._clock = folder, settle_seconds, clock
        self._leases = can_detect_closed(folder)
        self._sightings: dict[str, tuple[FileMark, float]] = {}  # by name, and since when
        self._looked_at = 0.0

    @property
    def settling_count(self) -> int:
        """The number of files that may be complete soon."""
        times = [since for _, since in self._sightings.values()]
        return sum(self._looked_at - since < SETTLING_SECONDS for since in times)

    def find_complete(
        self, folder: int, stats: Mapping[str, os.stat_result], now: float
    ) -> list[str]:
        """Find the complete ones of these files, oldest first; `now` is a monotonic time."""
        seen, self._sightings, self._looked_at = self._sightings, {}, now
        complete = []
        for name, found in stats.items():
            mark = mark_of(found)
            same = name in seen and seen[name][0] == mark
            since = seen[name][1] if same else now
            self._sightings[name] = mark, since
            if self._is_complete(folder, name, found, same, now - since):
                complete.append((found.st_mtime_ns, name))
        return [name for _, name in sorted(complete)]

    def forget(self, name: str) -> None:
        """Forget a file that has been taken away."""
        self._sightings.pop(name, None)

    def _is_complete(
        self, folder: int, name: str, found: os.stat_result, same: bool, stood: float
    ) -> bool:
        """Check one file; it has been the `same` since the last scan, and `stood` still."""
        settled = stood >= self.settle_seconds
        if not (self._leases or settled):
            return False
        try:
            with open_plain_file(folder, name) as file:
                writing = has_writer(file, self.folder / name, leases=self._leases)
        except (OSError, KeditError):
            return settled  # the claim finds what is wrong with it
        if writing is not False:
            return settled and writing is None
        aged = self._clock().timestamp() - found.st_mtime >= self.settle_seconds
        # An empty one may be about to be filled.
        return settled or aged or (same and found.st_size > 0)
