"""The folder that facts are dropped into: claims complete files, and puts each where it ends.

inbox/ -> work/ (a rename is the claim) -> done/ or failed/. Others may write into inbox/, so
nothing in it is followed or waited on, and their names are used in done/ and failed/ only.
"""

import errno
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from kedit_daemon.config import UNFINISHED_NAMES
from kedit_daemon.ingest.failed_files import REPORT_SUFFIX
from kedit_daemon.ingest.file_lease import can_detect_closed, is_closed
from kedit_daemon.ingest.parser import RecordProblem, extract_failed
from kedit_daemon.ingest.unfinished_names import is_unfinished
from memory.errors import KeditError
from memory.files import sync_folder, write_atomic
from memory.timestamps import format_utc

WORK, DONE, FAILED = "work", "done", "failed"
RESERVED_NAMES = (WORK, DONE, FAILED)
SAFE_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
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
    that cannot be detected, after `settle_seconds` without a change.
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
        self._can_detect_closed = can_detect_closed(self.folder)
        self.max_bytes = max_bytes
        self.unfinished_names = unfinished_names
        self._clock = clock
        # By name: inode, size and mtime, and since when they have been the same.
        self._sightings: dict[str, tuple[tuple[int, int, int], float]] = {}
        self._refused_names: set[str] = set()
        self._new_refusals: list[RefusedEntry] = []

    @property
    def settling_count(self) -> int:
        """The number of files that the last scan left because they may still be growing."""
        return len(self._sightings)

    def claim_files(self, now: float) -> list[Claim]:
        """Claim every file that is complete, oldest first; `now` is a monotonic time."""
        with _open_folder(self.folder) as inbox:
            stats = self._find_regular_files(inbox)
            wall, settled, seen = self._clock().timestamp(), [], self._sightings
            self._sightings = {}
            for name, found in stats.items():
                mark = (found.st_ino, found.st_size, found.st_mtime_ns)
                same = name in seen and seen[name][0] == mark
                self._sightings[name] = sighting = seen[name] if same else (mark, now)
                unchanged = max(wall - found.st_mtime, now - sighting[1])
                closed = same and self._can_detect_closed and _is_fully_written(inbox, name)
                if closed or unchanged >= self.settle_seconds:
                    settled.append((found.st_mtime_ns, name))
            claims = [c for _, name in sorted(settled) if (c := self._claim_file(inbox, name))]
        return self._admit_claims(claims)

    def take_refusals(self) -> list[RefusedEntry]:
        """Return the entries that were refused since the last call, each of them once."""
        refusals, self._new_refusals = self._new_refusals, []
        return refusals

    def pending_claims(self) -> list[Claim]:
        """List the claims that a crash has left in work/, oldest first. Call it before any scan."""
        with _open_folder(self.folder / WORK) as work:
            names = sorted(os.listdir(work))
            claimed = [name for name in names if not name.startswith(".")]
            for name in set(names) - {*claimed, *map(_note_name, claimed)}:
                os.unlink(name, dir_fd=work)
            claims = [self._restore_claim(work, name) for name in claimed]
        return self._admit_claims(claims)

    def read_claim(self, claim: Claim) -> bytes:
        """Read the claimed file; never more than `max_bytes` are loaded."""
        with _open_folder(self.folder / WORK) as work:
            data = _read_at_most(work, claim.work_name, self.max_bytes + 1)
        if len(data) > self.max_bytes:
            raise KeditError(f"{claim.name} has grown too large", code="bad-file")
        return data

    def finish_claim(self, claim: Claim) -> None:
        """Move the file to done/. Doing so twice is harmless."""
        with _open_folder(self.folder / DONE) as done:
            name = _clip_name(claim.original_name)
            taken = _stat_or_none(done, name) is not None
        self._move_from_work(claim, DONE, _make_distinct(name, claim) if taken else name)

    def fail_claim(self, claim: Claim, problems: Sequence[RecordProblem], whole: bool) -> None:
        """Write a report to failed/, next to the whole file or to a copy of its bad records alone.

        Only a whole file leaves work/ by this; otherwise call `finish_claim` afterwards. Doing so
        twice, as after a crash in the middle, ends in the same files.
        """
        with _open_folder(self.folder / FAILED) as failed:
            name = self._choose_failed_name(failed, claim)
        errors = [problem.as_dict(MAX_RECORD_CHARS) for problem in problems]
        at = format_utc(self._clock(), "seconds")
        report = {"claim": claim.work_name, "file": claim.name, "at": at, "errors": errors}
        folder = self.folder / FAILED
        write_atomic(folder / f"{name}{REPORT_SUFFIX}", _encode_json(report))
        if whole:
            self._move_from_work(claim, FAILED, name)
        elif any(problem.record for problem in problems):
            with _open_folder(self.folder / WORK) as work:
                data = _read_at_most(work, claim.work_name, self.max_bytes)
            records = extract_failed(data, claim.name, problems, self.max_bytes)
            write_atomic(folder / name, records)

    def _find_regular_files(self, inbox: int) -> dict[str, os.stat_result]:
        """Find the files that can be taken; all else is refused, and stays where it is."""
        names = [
            name
            for name in os.listdir(inbox)
            if name not in RESERVED_NAMES and not is_unfinished(name, self.unfinished_names)
        ]
        self._refused_names &= set(names)
        regular = {}
        for name in names:
            if (found := _stat_or_none(inbox, name)) is None:
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
            self._new_refusals.append(RefusedEntry(_printable_name(name), problem, remedy))

    def _claim_file(self, inbox: int, name: str) -> Claim | None:
        try:
            with _open_plain_file(inbox, name) as file:
                os.fsync(file)
        except PermissionError:
            self._refuse_entry(name, "it may not be read", "let the daemon's user read it")
            return None
        except (FileNotFoundError, KeditError):
            return None  # it was removed or replaced meanwhile
        stamp = self._clock().astimezone(UTC).strftime("%Y%m%dT%H%M%S%fZ")
        safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)[-40:]
        claim = Claim(f"{stamp}-{secrets.token_hex(4)}-{safe}", _printable_name(name), name)
        with _open_folder(self.folder / WORK) as work:
            # The original name is kept first: a crash in between leaves a note without a file.
            note = _note_name(claim.work_name)
            write_atomic(self.folder / WORK / note, _encode_json({"name": name}))
            try:
                os.rename(name, claim.work_name, src_dir_fd=inbox, dst_dir_fd=work)
            except FileNotFoundError:
                os.unlink(note, dir_fd=work)
                return None
        sync_folder(self.folder / WORK)
        sync_folder(self.folder)
        del self._sightings[name]
        return claim

    def _admit_claims(self, claims: list[Claim]) -> list[Claim]:
        """Return the claims that are small enough; the others go to failed/ unread."""
        admitted = []
        for claim in claims:
            with _open_folder(self.folder / WORK) as work:
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
            note = _read_at_most(work, _note_name(work_name), self.max_bytes)
            original = str(json.loads(note)["name"])
        except FileNotFoundError:
            original = work_name
        return Claim(work_name, _printable_name(original), original)

    def _choose_failed_name(self, failed: int, claim: Claim) -> str:
        """Choose the file's own name, or one of this claim alone if another claim has that."""
        name = _clip_name(claim.original_name)
        if name.endswith(REPORT_SUFFIX):
            name += ".json"  # or it would pass for the report of another file
        try:
            head = _read_at_most(failed, f"{name}{REPORT_SUFFIX}", 500)
            free = claim.work_name.encode() in head
        except FileNotFoundError:
            free = _stat_or_none(failed, name) is None
        except KeditError:
            free = False
        return name if free else _make_distinct(name, claim)

    def _move_from_work(self, claim: Claim, folder: str, name: str) -> None:
        with _open_folder(self.folder / WORK) as work, _open_folder(self.folder / folder) as target:
            try:
                os.rename(claim.work_name, name, src_dir_fd=work, dst_dir_fd=target)
            except FileNotFoundError:
                return
            os.fsync(target)
            os.fsync(work)
            with suppress(FileNotFoundError):
                os.unlink(_note_name(claim.work_name), dir_fd=work)


@contextmanager
def _open_folder(path: Path) -> Iterator[int]:
    """A folder of our own, as long as it really is one."""
    try:
        descriptor = os.open(path, SAFE_OPEN_FLAGS | os.O_DIRECTORY)
    except NotADirectoryError as error:
        hint = f"put a folder in the place of {path}"
        raise KeditError(f"{path} is not a folder", code="bad-file", hint=hint) from error
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _open_plain_file(folder: int, name: str) -> Iterator[int]:
    """Open a plain file for reading: links are not followed, and a pipe does not block."""
    not_plain = KeditError(f"{_printable_name(name)} is not a plain file", code="bad-file")
    try:
        descriptor = os.open(name, SAFE_OPEN_FLAGS, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise not_plain from error
        raise
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise not_plain
        yield descriptor
    finally:
        os.close(descriptor)


def _is_fully_written(folder: int, name: str) -> bool:
    """Check that a file has content and nobody has it open for writing."""
    try:
        with _open_plain_file(folder, name) as file:
            return os.fstat(file).st_size > 0 and is_closed(file)
    except (OSError, KeditError):
        return False  # the claim finds what is wrong with it


def _read_at_most(folder: int, name: str, max_bytes: int) -> bytes:
    with _open_plain_file(folder, name) as fd, open(fd, "rb", closefd=False) as file:
        return file.read(max_bytes)


def _stat_or_none(folder: int, name: str) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _encode_json(value: object) -> bytes:
    # Lone surrogates, from names that are not UTF-8, become the escapes that JSON has for them.
    return json.dumps(value, ensure_ascii=False, indent=1).encode("utf-8", "backslashreplace")


def _printable_name(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _note_name(work_name: str) -> str:
    return f".{work_name}.json"


def _clip_name(name: str) -> str:
    stem, suffix = os.path.splitext(os.fsencode(name))
    suffix = suffix[-20:]
    return os.fsdecode(stem[: MAX_NAME_BYTES - len(suffix)] + suffix)


def _make_distinct(name: str, claim: Claim) -> str:
    stem, suffix = os.path.splitext(name)
    return f"{stem}-{claim.work_name.split('-')[1]}{suffix}"
