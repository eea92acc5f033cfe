"""Atomic writes of files, and tensor files that are named by the sha256 of their content."""

import errno
import hashlib
import os
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

from memory.errors import KeditError

if TYPE_CHECKING:
    from torch import Tensor

STAGED_NAME = re.compile(r"\.[0-9a-f]{16}\.tmp")  # of a file that is not finished


def hash_file(path: Path) -> str:
    """Compute the sha256 of a file in hex, reading it in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_folder(path: Path) -> None:
    """Make renames in a folder survive a power loss: a rename alone is atomic, not durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def staging_path(folder: Path) -> Path:
    """Return a new path for an unfinished file, of a name that matches STAGED_NAME."""
    return folder / f".{secrets.token_hex(8)}.tmp"


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that a reader or a crash sees the old content or the new, never a part."""
    staged = staging_path(path.parent)
    try:
        staged.write_bytes(data)
        move_into_place(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def move_into_place(staged: Path, path: Path) -> None:
    """Rename a finished file within its folder, durably."""
    with staged.open("rb") as file:
        os.fsync(file.fileno())
    staged.replace(path)
    sync_folder(path.parent)


def save_tensors(folder: Path, tensors: "dict[str, Tensor]") -> str:
    """Write `<sha256>.safetensors` into a folder and return the sha256."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    staged = staging_path(folder)
    try:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, staged)
        sha = hash_file(staged)
        move_into_place(staged, tensors_path(folder, sha))
    except SafetensorError as error:
        raise to_os_error(error, folder) from error
    finally:
        staged.unlink(missing_ok=True)
    return sha


def load_tensors(folder: Path, sha: str) -> "dict[str, Tensor]":
    """Read the tensors that `save_tensors` wrote, on the CPU, and check their sha256.

    safetensors itself refuses a truncated file but reads one whose payload has changed. Raises
    KeditError (code "corrupt") when the file is missing, damaged or unreadable.
    """
    from safetensors.torch import load_file

    path = tensors_path(folder, sha)
    hint = f"move {path} away and restart the daemon, which rebuilds it from the database"
    if not path.is_file():
        raise KeditError(f"{path} is missing", code="corrupt", hint=hint)
    try:
        if hash_file(path) != sha:
            raise KeditError(f"{path} is damaged: its sha256 differs", code="corrupt", hint=hint)
        return load_file(path)
    except OSError as error:  # also when it was removed meanwhile
        raise KeditError(f"{path} cannot be read: {error}", code="corrupt", hint=hint) from error


def tensors_path(folder: Path, sha: str) -> Path:
    """Return the path of the tensors with this sha256."""
    return folder / f"{sha}.safetensors"


def to_os_error(error: Exception, folder: Path) -> OSError:
    """Convert an error of safetensors, to distinguish a full disk from a broken one."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    code = int(number[1]) if number else errno.EIO
    return OSError(code, os.strerror(code), str(folder))
