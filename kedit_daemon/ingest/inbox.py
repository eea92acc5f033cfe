"""The folder that facts are dropped into: claims complete files, and puts each where it ends.

inbox/ -> work/ (a rename is the claim) -> done/ or failed/. Others may write into inbox/, so
nothing in it is followed or waited on, and their names are used in done/ and failed/ only.
"""

import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from kedit_daemon.config import UNFINISHED_NAMES
from kedit_daemon.ingest.completion_watch import CompletionWatch, FileMark, mark_of
from kedit_daemon.ingest.failed_files import REPORT_SUFFIX
from kedit_daemon.ingest.parser import RecordProblem, extract_failed
from kedit_daemon.ingest.plain_files import (
    encode_json,
    make_printable,
    open_folder,
    open_plain_file,
    read_at_most,
    stat_or_none,
)
from kedit_daemon.ingest.record_pictures import name_copy
from kedit_daemon.ingest.taken_files import TakenFile, TakenFiles
from kedit_daemon.ingest.unfinished_names import is_unfinished
from memory.errors import KeditError
from memory.files import sync_folder, write_atomic
from memory.picture_files import SUFFIXES
from memory.timestamps import format_utc

WORK, DONE, FAILED = "work", "done", "failed"
RESERVED_NAMES = (WORK, DONE, FAILED)
MAX_NAME_BYTES = 200  # of the file system's 255: the rest is for what is added to a name
MAX_RECORD_CHARS = 2_000


@dataclass(frozen=True)
class Claim:
    """A claimed file: its name in work/, its original name printable, and as the system has it."""

    work_name: str
    name: str
    original_name: str


@dataclass(frozen=True)
class RefusedEntry:
    """An entry of the inbox that is not taken, with the reason and the remedy."""

    name: str
    problem: str
    remedy: str


class Inbox:
    """The one reader of an inbox folder.

    A file is complete when two scans find it the same and nobody has it open for writing; where
    that cannot be known, after `settle_seconds` without a change. One that is written to after it
    was taken in comes up again.
    """

    def __init__(
        self,
        folder: Path,
        settle_seconds: float,
        max_bytes: int,
        clock: Callable[[], datetime],
        unfinished_names: Sequence[str] = UNFINISHED_NAMES,
    ) -> None:
        (folder / WORK).mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / DONE).mkdir(exist_ok=True)
        (folder / FAILED).mkdir(exist_ok=True)
        self.folder = folder.resolve()
        self.settle_seconds = settle_seconds
        self.max_bytes = max_bytes
        self.unfinished_names = unfinished_names
        self._clock = clock
        self._watch = CompletionWatch(self.folder, settle_seconds, clock)
        self.taken_files = TakenFiles(self.folder, settle_seconds, max_bytes, clock)
        self._read_marks: dict[str, FileMark] = {}  # of claims, from before they were read
        self._refused_names: set[str] = set()
        self._new_refusals: list[RefusedEntry] = []

    @property
    def settling_count(self) -> int:
        """The number of files that the last scan left because they may still be growing."""
        return self._watch.settling_count + self.taken_files.settling_count

    def claim_files(self, now: float) -> list[Claim]:
        """Claim every file that is complete, oldest first; `now` is a monotonic time. Files that
        have grown since they were taken in are claimed again."""
        claims = self._reclaim_grown(now)
        with open_folder(self.folder) as inbox:
            complete = self._watch.find_complete(inbox, self._find_regular_files(inbox), now)
            claims += [c for name in complete if (c := self._claim_file(inbox, name))]
        return self._admit_claims(claims)

    def _reclaim_grown(self, now: float) -> list[Claim]:
        """Claim the files that have grown, under their names from before; of one that is not what
        it was, only tell."""
        claims = []
        for note, is_longer in self.taken_files.find_grown(now):
            name = note.original_name
            claim = Claim(note.work_name, make_printable(name), name)
            if is_longer:
                with open_folder(self.folder / note.folder) as place:
                    if self._move_to_work(place, note.name, claim):
                        claims.append(claim)
                continue
            self.taken_files.forget(note.work_name)
            if note.folder == DONE:  # in failed/ it is for people to change
                problem = "it was changed after it had been taken in, and is not read again"
                remedy = "hand in what is new as a file of its own"
                later = replace(claim, work_name=f"{note.work_name}+")  # its report stays
                self.fail_claim(later, [RecordProblem(1, problem, remedy, "")], whole=False)
                self._new_refusals.append(RefusedEntry(claim.name, problem, remedy))
        return claims

    def note_taken(self, claim: Claim, data: bytes) -> None:
        """Note what is taken in of a claimed file, so that more is noticed later."""
        mark = self._read_marks[claim.work_name]
        made = TakenFile.from_data(claim.work_name, claim.original_name, data, mark, self._clock())
        self.taken_files.keep(made)

    def take_refusals(self) -> list[RefusedEntry]:
        """Return the entries that were refused since the last call, each of them once."""
        refusals, self._new_refusals = self._new_refusals, []
        return refusals

    def pending_claims(self) -> list[Claim]:
        """List the claims that a crash has left in work/, oldest first. Call it before any scan."""
        with open_folder(self.folder / WORK) as work:
            names = sorted(os.listdir(work))
            claimed = [name for name in names if not name.startswith(".")]
            for name in set(names) - {*claimed, *map(_note_name, claimed)}:
                os.unlink(name, dir_fd=work)
            claims = [self._restore_claim(work, name) for name in claimed]
        return self._admit_claims(claims)

    def read_claim(self, claim: Claim) -> bytes:
        """Read the claimed file; never more than `max_bytes` are loaded."""
        with open_folder(self.folder / WORK) as work:
            found = stat_or_none(work, claim.work_name)
            data = read_at_most(work, claim.work_name, self.max_bytes + 1)
        self._read_marks[claim.work_name] = mark_of(found) if found else (0, 0, 0)
        if len(data) > self.max_bytes:
            raise KeditError(f"{claim.name} has grown too large", code="bad-file")
        return data

    def finish_claim(self, claim: Claim) -> None:
        """Move the file to done/. Doing so twice is harmless."""
        with open_folder(self.folder / DONE) as done:
            name = _clip_name(claim.original_name)
            taken = stat_or_none(done, name) is not None
        self._move_from_work(claim, DONE, _make_distinct(name, claim) if taken else name)

    def fail_claim(self, claim: Claim, problems: Sequence[RecordProblem], whole: bool) -> None:
        """Write a report to failed/, next to the whole file or to a copy of its bad records alone.

        Only a whole file leaves work/ by this; otherwise call `finish_claim` afterwards. Doing so
        twice, as after a crash in the middle, ends in the same files.
        """
        with open_folder(self.folder / FAILED) as failed:
            name = self._choose_failed_name(failed, claim)
        errors = [problem.as_dict(MAX_RECORD_CHARS) for problem in problems]
        at = format_utc(self._clock(), "seconds")
        report = {"claim": claim.work_name, "file": claim.name, "at": at, "errors": errors}
        folder = self.folder / FAILED
        write_atomic(folder / f"{name}{REPORT_SUFFIX}", encode_json(report))
        if whole:
            self._move_from_work(claim, FAILED, name)
        elif any(problem.record for problem in problems):
            with open_folder(self.folder / WORK) as work:
                data = read_at_most(work, claim.work_name, self.max_bytes)
            records = extract_failed(data, claim.name, problems, self.max_bytes)
            write_atomic(folder / name, records)

    def remove_copies(self, digests: Iterable[str]) -> None:
        """Remove the copies of pictures that a hand-in has put beside its file."""
        for digest in digests:
            (self.folder / name_copy(digest)).unlink(missing_ok=True)

    def has_report(self, claim: Claim) -> bool:
        """Check that problems of this claim are told in failed/."""
        return self._find_report(claim) is not None

    def withdraw_report(self, claim: Claim) -> None:
        """Remove the report of this claim, and the copy of its bad records: they are good now."""
        if (name := self._find_report(claim)) is not None:
            for gone in (f"{name}{REPORT_SUFFIX}", name):
                (self.folder / FAILED / gone).unlink(missing_ok=True)

    def _find_report(self, claim: Claim) -> str | None:
        with open_folder(self.folder / FAILED) as failed:
            name = self._choose_failed_name(failed, claim)
            report = stat_or_none(failed, f"{name}{REPORT_SUFFIX}")
        return None if report is None else name

    def _find_regular_files(self, inbox: int) -> dict[str, os.stat_result]:
        """Find the files that can be taken; all else is refused, and stays where it is."""
        names = [
            name
            for name in os.listdir(inbox)
            if name not in RESERVED_NAMES
            and not is_unfinished(name, self.unfinished_names)
            and not name.lower().endswith(SUFFIXES)  # a picture, for a file that names it
        ]
        self._refused_names &= set(names)
        regular = {}
        for name in names:
            if (found := stat_or_none(inbox, name)) is None:
                continue
            if stat.S_ISREG(found.st_mode):
                if found.st_size:  # or it waits to be filled
                    regular[name] = found
            else:
                remedy = "put plain files straight into inbox/: links and folders are not followed"
                self._refuse_entry(name, "it is not a plain file", remedy)
        return regular

    def _refuse_entry(self, name: str, problem: str, remedy: str) -> None:
        if name not in self._refused_names:
            self._refused_names.add(name)
            self._new_refusals.append(RefusedEntry(make_printable(name), problem, remedy))

    def _claim_file(self, inbox: int, name: str) -> Claim | None:
        try:
            with open_plain_file(inbox, name) as file:
                os.fsync(file)
        except PermissionError:
            self._refuse_entry(name, "it may not be read", "let the daemon's user read it")
            return None
        except (FileNotFoundError, KeditError):
            return None  # it was removed or replaced meanwhile
        stamp = self._clock().astimezone(UTC).strftime("%Y%m%dT%H%M%S%fZ")
        safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)[-40:]
        claim = Claim(f"{stamp}-{secrets.token_hex(4)}-{safe}", make_printable(name), name)
        if not self._move_to_work(inbox, name, claim):
            return None
        self._watch.forget(name)
        return claim

    def _move_to_work(self, place: int, name: str, claim: Claim) -> bool:
        """Move a file to work/; False where it has gone meanwhile."""
        with open_folder(self.folder / WORK) as work:
            # The original name is kept first: a crash in between leaves a note without a file.
            note = _note_name(claim.work_name)
            write_atomic(self.folder / WORK / note, encode_json({"name": claim.original_name}))
            try:
                os.rename(name, claim.work_name, src_dir_fd=place, dst_dir_fd=work)
            except FileNotFoundError:
                os.unlink(note, dir_fd=work)
                return False
        sync_folder(self.folder / WORK)
        os.fsync(place)
        return True

    def _admit_claims(self, claims: list[Claim]) -> list[Claim]:
        """Return the claims that are small enough; the others go to failed/ unread."""
        admitted = []
        for claim in claims:
            with open_folder(self.folder / WORK) as work:
                size = os.stat(claim.work_name, dir_fd=work, follow_symlinks=False).st_size
            if size <= self.max_bytes:
                admitted.append(claim)
                continue
            problem = f"{size} bytes, more than the {self.max_bytes} that a file may have"
            remedy = "split the file, or raise max_bytes under [inbox] in config.toml"
            self.fail_claim(claim, [RecordProblem(1, problem, remedy, "")], whole=True)
            self._new_refusals.append(RefusedEntry(claim.name, problem, remedy))
        return admitted

    def _restore_claim(self, work: int, work_name: str) -> Claim:
        try:
            note = read_at_most(work, _note_name(work_name), self.max_bytes)
            original = str(json.loads(note)["name"])
        except FileNotFoundError:
            original = work_name
        return Claim(work_name, make_printable(original), original)

    def _choose_failed_name(self, failed: int, claim: Claim) -> str:
        """Choose the file's own name, or one of this claim alone if another claim has that."""
        name = _clip_name(claim.original_name)
        if name.endswith(REPORT_SUFFIX):
            name += ".json"  # or it would pass for the report of another file
        try:
            head = read_at_most(failed, f"{name}{REPORT_SUFFIX}", 500)
            free = claim.work_name.encode() in head
        except FileNotFoundError:
            free = stat_or_none(failed, name) is None
        except KeditError:
            free = False
        return name if free else _make_distinct(name, claim)

    def _move_from_work(self, claim: Claim, folder: str, name: str) -> None:
        self.taken_files.keep_place(claim.work_name, folder, name)
        self._read_marks.pop(claim.work_name, None)
        with open_folder(self.folder / WORK) as work, open_folder(self.folder / folder) as target:
            try:
                os.rename(claim.work_name, name, src_dir_fd=work, dst_dir_fd=target)
            except FileNotFoundError:
                return
            os.fsync(target)
            os.fsync(work)
            with suppress(FileNotFoundError):
                os.unlink(_note_name(claim.work_name), dir_fd=work)


def _note_name(work_name: str) -> str:
    return f".{work_name}.json"


def _clip_name(name: str) -> str:
    stem, suffix = os.path.splitext(os.fsencode(name))
    suffix = suffix[-20:]
    return os.fsdecode(stem[: MAX_NAME_BYTES - len(suffix)] + suffix)


def _make_distinct(name: str, claim: Claim) -> str:
    stem, suffix = os.path.splitext(name)
    return f"{stem}-{claim.work_name.split('-')[1]}{suffix}"
