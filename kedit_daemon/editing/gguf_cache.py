"""Checkpoints that were converted from GGUF files, each named by the sha256 of its file.

A file is converted once, for all homes that share the cache: under a lock, in a folder of another
name, which is renamed when it is whole and on the disk.
"""

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kedit_daemon.system.disk import (
    DISK_FULL,
    FREE_SPACE_HINT,
    is_disk_full,
    measure_free_bytes,
)
from memory.errors import KeditError, UnusableModel
from memory.files import STAGED_NAME, hash_file, staging_path, sync_folder, write_atomic
from memory.model.gguf_conversion import FLOAT32_BYTES, convert_gguf, count_numbers
from memory.model.strict_loading import check_model_folder

LOCK_FILE = ".lock"
SOURCE_FILE = "source.json"  # in each checkpoint: the identity of the file it was made from
FILE_HINT = "put the file back, and let this user read it"
CACHE_HINT = "set KEDIT_CACHE to a folder that you may write"
log = logging.getLogger(__name__)


class GgufCache:
    """The folder of converted checkpoints; `tell` is given a line about work that takes long."""

    def __init__(self, folder: Path, tell: Callable[[str], object] = log.info) -> None:
        self.folder, self._tell = folder, tell

    def find_checkpoint(self, file: Path) -> Path:
        """Return the folder with the model of a GGUF file; the file is converted if need be.

        Raises UnusableModel: the file cannot be read, or there is no model in it that can be
        edited, or the cache cannot be written. KeditError (code "disk-full").
        """
        try:
            identity = _read_identity(file)
            known = self._find_by_identity(identity)
            return known or self._find_by_content(file, identity)
        except OSError as error:
            if is_disk_full(error):
                raise _disk_full_error(self.folder, "no space is left") from error
            hint = FILE_HINT if str(error.filename) == str(file) else CACHE_HINT
            problem = f"{error.filename or self.folder}: {error.strerror or error}"
            raise UnusableModel(problem, hint=hint) from error

    @contextmanager
    def explain_damage(self, folder: Path | None) -> Iterator[None]:
        """Name another remedy for what is wrong with a folder that is a checkpoint of this cache:
        it was whole when it was made."""
        try:
            yield
        except UnusableModel as error:
            if folder is None or folder.parent != self.folder:
                raise
            hint = f"remove {folder}: it is made again from its GGUF file"
            raise type(error)(str(error), hint=hint) from error

    def _find_by_identity(self, identity: list[int]) -> Path | None:
        """Return the checkpoint of a file that was hashed before, and has not changed since."""
        for path in self.folder.glob(f"*/{SOURCE_FILE}"):
            with suppress(OSError, ValueError):
                if json.loads(path.read_bytes()) == identity:
                    return path.parent
        return None

    def _find_by_content(self, file: Path, identity: list[int]) -> Path:
        folder = self.folder / hash_file(file)
        if not folder.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._hold_lock():
                if not folder.is_dir():  # another process may have made it meanwhile
                    self._convert(file, identity, folder)
        _refuse_change(file, identity)
        with suppress(OSError):  # the cache may be read-only: then the next start hashes again
            write_atomic(folder / SOURCE_FILE, json.dumps(identity).encode())
        return folder

    def _convert(self, file: Path, identity: list[int], folder: Path) -> None:
        for path in self.folder.iterdir():
            if STAGED_NAME.fullmatch(path.name):  # of a process that was killed: we hold the lock
                shutil.rmtree(path)
        numbers = count_numbers(file)
        needed = numbers * FLOAT32_BYTES
        if measure_free_bytes(self.folder) < needed:
            raise _disk_full_error(self.folder, f"{file} takes {needed >> 20} MB when converted")
        self._tell(f"converting {file} to safetensors, once: {needed >> 20} MB in {folder}")
        began, staged = time.monotonic(), staging_path(self.folder)
        try:
            staged.mkdir()
            convert_gguf(file, staged, numbers)
            _check_converted(staged, file)
            _refuse_change(file, identity)
            _sync_files(staged)
            staged.rename(folder)
            sync_folder(self.folder)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        self._tell(f"converted it in {time.monotonic() - began:.0f} s")

    @contextmanager
    def _hold_lock(self) -> Iterator[None]:
        """Wait until no other process converts, and keep others from it during the block."""
        fd = os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._tell(f"waiting for another process that converts a model in {self.folder}")
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def _read_identity(file: Path) -> list[int]:
    """Return what changes with any change of a file's content: nobody sets the last number back."""
    with file.open("rb") as opened:  # what may not be read is found at once
        found = os.fstat(opened.fileno())
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]


def _refuse_change(file: Path, identity: list[int]) -> None:
    if _read_identity(file) != identity:
        hint = "start again when it is whole"
        raise UnusableModel(f"{file} has changed while it was read", hint=hint)


def _disk_full_error(folder: Path, reason: str) -> KeditError:
    hint = f"{FREE_SPACE_HINT.format(folder)}, or set KEDIT_CACHE to a folder on another"
    return KeditError(f"{folder}: {DISK_FULL}: {reason}", code="disk-full", hint=hint)


def _check_converted(folder: Path, file: Path) -> None:
    """Check the model as any other; errors name the file, not the folder, which is to be gone."""
    try:
        check_model_folder(folder)
    except UnusableModel as error:
        raise type(error)(str(error).replace(str(folder), str(file)), hint=error.hint) from error


def _sync_files(folder: Path) -> None:
    """Put all files of a folder on the disk, so that a rename cannot come before them."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
