"""Files in folders that others may write to: nothing is followed or waited on."""

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memory.errors import KeditError

SAFE_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextmanager
def open_folder(path: Path) -> Iterator[int]:
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
def open_plain_file(folder: int, name: str) -> Iterator[int]:
    """Open a plain file for reading: links are not followed, and a pipe does not block."""
    not_plain = KeditError(f"{make_printable(name)} is not a plain file", code="bad-file")
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


def read_at_most(folder: int, name: str, max_bytes: int) -> bytes:
    """Read the beginning of a plain file."""
    with open_plain_file(folder, name) as fd, open(fd, "rb", closefd=False) as file:
        return file.read(max_bytes)


def stat_or_none(folder: int, name: str) -> os.stat_result | None:
    """Read the metadata of an entry, not of what it links to; None where there is none."""
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def encode_json(value: object) -> bytes:
    """Encode a value as JSON in UTF-8."""
    # Lone surrogates, from names that are not UTF-8, become the escapes that JSON has for them.
    return json.dumps(value, ensure_ascii=False, indent=1).encode("utf-8", "backslashreplace")


def make_printable(name: str) -> str:
    """Make a file name valid UTF-8: other bytes are escaped."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
