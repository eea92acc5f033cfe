"""Notes of the files that were taken in lately, so that what is written to them later is noticed.

A writer who has a file open writes on when it is renamed to done/ or failed/. The notes lie in
.taken/, one a file, and outlive a crash.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Self

from kedit_daemon.ingest.completion_watch import CompletionWatch, FileMark, mark_of
from kedit_daemon.ingest.plain_files import encode_json, open_folder, read_at_most, stat_or_none
from kedit_daemon.system.disk import is_disk_full
from memory.files import write_atomic

NOTES = ".taken"
WATCHED_SECONDS = 86_400.0
MAX_WATCHED = 1_000


@dataclass(frozen=True)
class TakenFile:
    """A file as it was taken in, and the place that it has now: a folder and a name there."""

    work_name: str
    original_name: str
    size: int
    sha256: str
    taken_at: float
    folder: str = ""
    name: str = ""
    mark: FileMark = (0, 0, 0)  # when it was read last

    @classmethod
    def from_data(
        cls, work_name: str, original_name: str, data: bytes, mark: FileMark, now: datetime
    ) -> Self:
        """Make the note of a file with this content; `mark` is from before it was read."""
        digest = hashlib.sha256(data).hexdigest()
        return cls(work_name, original_name, len(data), digest, now.timestamp(), mark=mark)

    def has_content(self, data: bytes) -> bool:
        """Check that this content begins with what was taken in."""
        return hashlib.sha256(data[: self.size]).hexdigest() == self.sha256


class TakenFiles:
    """The notes, by the name that the file had in work/."""

    def __init__(
        self, inbox: Path, settle_seconds: float, max_bytes: int, clock: Callable[[], datetime]
    ) -> None:
        self.inbox, self.max_bytes, self._clock = inbox, max_bytes, clock
        (inbox / NOTES).mkdir(mode=0o700, exist_ok=True)
        self._settle_seconds = settle_seconds
        self._watches: dict[str, CompletionWatch] = {}
        self._notes: dict[str, TakenFile] = {}
        for path in sorted((inbox / NOTES).glob("*.json")):
            with suppress(ValueError, TypeError, OSError):  # what a stranger wrote is no note
                note = TakenFile(**json.loads(path.read_bytes()))
                inode, size, changed = note.mark
                self._notes[note.work_name] = replace(note, mark=(inode, size, changed))

    def find(self, work_name: str) -> TakenFile | None:
        """Return the note of a file, if there is one."""
        return self._notes.get(work_name)

    def keep(self, note: TakenFile) -> None:
        """Keep a note, in place of an older one of the same file; on a full disk until the daemon
        stops."""
        self._notes.pop(note.work_name, None)
        self._notes[note.work_name] = note
        with open_folder(self.inbox / NOTES):  # which is no link to elsewhere
            path = self.inbox / NOTES / f"{note.work_name}.json"
            try:
                write_atomic(path, encode_json(asdict(note)))
            except OSError as error:
                if not is_disk_full(error):
                    raise
        for oldest in list(self._notes)[:-MAX_WATCHED]:
            self.forget(oldest)

    def keep_place(self, work_name: str, folder: str, name: str) -> None:
        """Note where a file ends; it is about to be moved there."""
        note = self._notes.get(work_name)
        if note is not None and (note.folder, note.name) != (folder, name):
            self.keep(replace(note, folder=folder, name=name))

    @property
    def settling_count(self) -> int:
        """The number of files that may have been written to."""
        return sum(watch.settling_count for watch in self._watches.values())

    def forget(self, work_name: str) -> None:
        """Drop a note, if there is one."""
        if self._notes.pop(work_name, None) is not None:
            (self.inbox / NOTES / f"{work_name}.json").unlink(missing_ok=True)

    def find_grown(self, now: float) -> list[tuple[TakenFile, bool]]:
        """Find the files that have been written to since, and whether what was taken in is still
        there, at their beginning."""
        oldest = self._clock().timestamp() - WATCHED_SECONDS
        for note in [n for n in self._notes.values() if n.taken_at < oldest]:
            self.forget(note.work_name)
        folders = sorted({note.folder for note in self._notes.values()} - {""})
        return [grown for folder in folders for grown in self._find_grown_in(folder, now)]

    def _find_grown_in(self, folder: str, now: float) -> list[tuple[TakenFile, bool]]:
        notes = {note.name: note for note in self._notes.values() if note.folder == folder}
        with open_folder(self.inbox / folder) as place:
            changed = self._stat_changed(place, notes)
            watch = self._watches.setdefault(
                folder, CompletionWatch(self.inbox / folder, self._settle_seconds, self._clock)
            )
            grown = []
            for name in watch.find_complete(place, changed, now):
                note, found = notes[name], changed[name]
                data = read_at_most(place, name, self.max_bytes + 1)
                self._notes[note.work_name] = replace(note, mark=mark_of(found))
                if len(data) != note.size or not note.has_content(data):
                    grown.append((note, len(data) > note.size and note.has_content(data)))
        return grown

    def _stat_changed(
        self, place: int, notes: Mapping[str, TakenFile]
    ) -> dict[str, os.stat_result]:
        """Read the metadata of the files that are not as they were looked at last."""
        changed = {}
        for name, note in notes.items():
            found = stat_or_none(place, name)
            if found is None or found.st_ino != note.mark[0]:
                self.forget(note.work_name)
            elif mark_of(found) != note.mark:
                changed[name] = found
        return changed
