"""An export's folder: staged, synced, renamed after its content, and never changed again.

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

from memory.canonical_json import replace_non_finite
from memory.errors import KeditError
from memory.files import hash_file, sync_folder

MANIFEST = "manifest.json"
FORMAT = "kedit-export-1"
STAGED_PREFIX = ".kedit-export-"  # of unfinished folders, which a crash may leave


@dataclass(frozen=True)
class PlacedExport:
    """The path of an export, whether it existed before, and the older exports that were deleted."""

    path: Path
    existed: bool
    removed: tuple[str, ...]
    manifest: dict[str, Any]


def place_export(
    dest: Path, keep: int | None, fill: Callable[[Path], tuple[str, dict[str, Any]]]
) -> PlacedExport:
    """Make an export in the folder `dest`, whole or not at all.

    fill: writes the files into a folder and returns the stem of the export's name and the entries
    of its manifest; no other export is made there meanwhile. keep: the number of versions of one
    kind and home that stay, the newest; this one stays in any case. Raises KeditError when it
    cannot be written, or an export of the same name is damaged.
    """
    try:
        dest.mkdir(parents=True, exist_ok=True)
        with _lock_folder(dest):
            _remove_leftovers(dest)
            staged = dest / f"{STAGED_PREFIX}{secrets.token_hex(8)}"
            staged.mkdir()
            try:
                stem, entries = fill(staged)
                manifest = _write_manifest(staged, entries)
                path, existed = _move_into_place(staged, dest, stem)
            finally:
                shutil.rmtree(staged, ignore_errors=True)
            removed = () if keep is None else _delete_exports(_find_surplus(path, manifest, keep))
    except OSError as error:
        raise KeditError(
            f"cannot export to {dest}: {error.strerror or error}",
            code="export",
            hint="choose a folder that you may write to, on a disk with free space",
        ) from error
    return PlacedExport(path, existed, removed, manifest)


def prune_exports(path: Path, keep: int, withdraw: Callable[[Sequence[str]], None]) -> None:
    """Delete older exports of the kind and home of the one at `path`, all but the newest `keep`.

    `withdraw` is called with their names first.
    """
    with _lock_folder(path.parent):
        if older := _find_surplus(path, _read_manifest(path), keep):
            withdraw([other.name for other in older])
            _delete_exports(older)


@contextmanager
def _lock_folder(dest: Path) -> Iterator[None]:
    """Admit one export at a time to a folder: unfinished ones in it are then leftovers."""
    descriptor = os.open(dest, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(dest: Path) -> None:
    for path in dest.glob(f"{STAGED_PREFIX}*"):
        shutil.rmtree(path)


def _write_manifest(staged: Path, entries: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest and sync all files of the folder to the disk."""
    files = {path.name: hash_file(path) for path in sorted(staged.iterdir())}
    manifest: dict[str, Any] = {"format": FORMAT, **replace_non_finite(entries), "files": files}
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
    """Rename the folder after its content, unless an identical one exists."""
    digest = hash_file(staged / MANIFEST)
    path = dest / f"{stem}-{digest[:12]}"
    if path.is_dir():
        if damage := _find_damage(path, digest):
            hint = "move that folder away and export again"
            raise KeditError(f"{path} is not what it was: {damage}", code="corrupt", hint=hint)
        return path, True
    staged.rename(path)
    sync_folder(dest)
    return path, False


def _find_damage(path: Path, digest: str) -> str:
    """Describe what of a finished export has changed; an empty text if nothing has."""
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
    """List the finished exports of a kind from one home in the folder `dest`, newest first."""
    found = []
    for path in dest.iterdir() if dest.is_dir() else ():
        manifest = _read_manifest(path)
        if [manifest.get(k) for k in ("format", "kind", "home")] == [FORMAT, kind, home]:
            written = (path / MANIFEST).stat().st_mtime_ns
            found.append((int(manifest["generation"]), written, path))
    return [path for _, _, path in sorted(found, reverse=True)]


def _find_surplus(path: Path, manifest: dict[str, Any], keep: int) -> list[Path]:
    newest_first = list_exports(path.parent, manifest["kind"], manifest["home"])
    return [other for other in newest_first[keep:] if other != path]


def _delete_exports(paths: Sequence[Path]) -> tuple[str, ...]:
    """Delete exports and return their names, sorted."""
    for path in paths:
        # Renamed first: no reader may find a part of it under its name.
        gone = path.rename(path.with_name(f"{STAGED_PREFIX}{secrets.token_hex(8)}"))
        shutil.rmtree(gone)
    return tuple(sorted(path.name for path in paths))


def _read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a folder; empty if it is no export."""
    if path.is_symlink() or path.name.startswith("."):
        return {}
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
    except (OSError, ValueError):
        return {}
    sound = isinstance(manifest, dict) and isinstance(manifest.get("generation"), int)
    return manifest if sound else {}
