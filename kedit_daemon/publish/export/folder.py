"""An export's folder: built beside its place, synced, named by what is in it, never changed again.

DEST/<model>-gen-<generation>-<kind>-<first 12 of the sha256 of manifest.json>/
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memory.db.event_log import replace_non_finite
from memory.errors import KeditError
from memory.files import hash_file, sync_folder

MANIFEST = "manifest.json"
FORMAT = "kedit-export-1"
STAGED_PREFIX = ".kedit-export-"  # what a crash leaves begins like this


@dataclass(frozen=True)
class PlacedExport:
    """Where an export lies, whether it was there before, and which older ones were deleted."""

    path: Path
    existed: bool
    removed: tuple[str, ...]
    manifest: dict[str, Any]


def place_export(
    dest: Path, keep: int | None, fill: Callable[[Path], tuple[str, dict[str, Any]]]
) -> PlacedExport:
    """Make an export in the folder `dest`, whole or not at all.

    fill: writes the files into a folder, and says how the export's name begins and what the
    manifest tells of them; no other export is made there meanwhile. keep: how many versions of one
    kind and home may stay, the newest; this one stays in any case. Raises KeditError when it
    cannot be written, or what is there is damaged.
    """
    try:
        dest.mkdir(parents=True, exist_ok=True)
        with _lock_folder(dest):
            _remove_leftovers(dest)
            staged = dest / f"{STAGED_PREFIX}{secrets.token_hex(8)}"
            staged.mkdir()
            try:
                stem, told = fill(staged)
                manifest = _write_manifest(staged, told)
                path, existed = _move_into_place(staged, dest, stem)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
            removed = () if keep is None else _delete_exports(_find_surplus(path, manifest, keep))
    except OSError as error:
        raise KeditError(
            f"cannot export to {dest}: {error.strerror or error}",
            code="export",
            hint="choose a folder that you may write, on a disk with room",
        ) from error
    return PlacedExport(path, existed, removed, manifest)


def prune_exports(path: Path, keep: int, leaving: Callable[[Sequence[str]], None]) -> None:
    """Delete exports of the kind and home of the one at `path`, as `place` does; but first
    `leaving` hears their names."""
    with _lock_folder(path.parent):
        if older := _find_surplus(path, _read_manifest(path), keep):
            leaving([other.name for other in older])
            _delete_exports(older)


@contextmanager
def _lock_folder(dest: Path) -> Iterator[None]:
    """One export at a time in a folder: what is unfinished in it then is nobody's any more."""
    descriptor = os.open(dest, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(dest: Path) -> None:
    for path in dest.glob(f"{STAGED_PREFIX}*"):
        shutil.rmtree(path)


def _write_manifest(staged: Path, told: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest beside the files, and everything to the disk."""
    files = {path.name: hash_file(path) for path in sorted(staged.iterdir())}
    manifest: dict[str, Any] = {"format": FORMAT, **replace_non_finite(told), "files": files}
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    (staged / MANIFEST).write_text(text, encoding="utf-8")
    mode = (staged / MANIFEST).stat().st_mode
    for path in staged.iterdir():
        path.chmod(mode)  # safetensors lets only the owner read, and servers are other users
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(staged)
    return manifest


def _move_into_place(staged: Path, dest: Path, stem: str) -> tuple[Path, bool]:
    """Give the folder its name, unless an identical one has it."""
    digest = hash_file(staged / MANIFEST)
    path = dest / f"{stem}-{digest[:12]}"
    if path.is_dir():
        if wrong := _find_damage(path, digest):
            raise KeditError(
                f"{path} is not what it was: {wrong}",
                code="corrupt",
                hint="move that folder away and export again",
            )
        return path, True
    staged.rename(path)
    sync_folder(dest)
    return path, False


def _find_damage(path: Path, digest: str) -> str:
    """In words, what of a finished export has changed; nothing if nothing has."""
    try:
        text = (path / MANIFEST).read_bytes()
        if hashlib.sha256(text).hexdigest() != digest:
            return f"{MANIFEST} has changed"
        for name, sha in json.loads(text)["files"].items():
            if hash_file(path / name) != sha:
                return f"{name} has changed"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    return ""


def list_exports(dest: Path, kind: str, home: str) -> list[Path]:
    """The finished exports of a kind from one home in the folder `dest`, the newest first."""
    found = []
    for path in dest.iterdir() if dest.is_dir() else ():
        told = _read_manifest(path)
        if (told.get("format"), told.get("kind"), told.get("home")) == (FORMAT, kind, home):
            written = (path / MANIFEST).stat().st_mtime_ns
            found.append((int(told["generation"]), written, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def _find_surplus(path: Path, manifest: dict[str, Any], keep: int) -> list[Path]:
    newest_first = list_exports(path.parent, manifest["kind"], manifest["home"])
    return [other for other in newest_first[keep:] if other != path]


def _delete_exports(paths: Sequence[Path]) -> tuple[str, ...]:
    """Delete exports; their names."""
    for path in paths:
        # No reader shall find a part of it under its name.
        gone = path.rename(path.with_name(f"{STAGED_PREFIX}{secrets.token_hex(8)}"))
        shutil.rmtree(gone)
    return tuple(sorted(path.name for path in paths))


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a folder; empty where it has none of ours."""
    if path.is_symlink() or path.name.startswith("."):
        return {}
    try:
        told = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}
    return told if isinstance(told, dict) and isinstance(told.get("generation"), int) else {}
