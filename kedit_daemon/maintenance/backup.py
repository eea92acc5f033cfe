"""Backups: one state of a home, in a folder with the layout of a home, and a manifest.

The database is the only truth, so a snapshot of it comes first and names the tensor files that
belong to it. Left out is what can be rebuilt, such as the retrieval index, and what was never taken
in: a file in the inbox, claimed or not, is in no database until all its facts are.
"""

import errno
import json
import os
import re
import secrets
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from kedit_daemon.home import FOLDER_MODE, Home, open_database
from kedit_daemon.system.disk import is_disk_full
from memory.db import event_log, meta_keys, schema
from memory.errors import KeditError
from memory.files import hash_file, sync_folder, tensors_path, write_atomic
from memory.timestamps import format_utc

FORMAT = "kedit-backup-1"
MANIFEST = "manifest.json"
# In the name of a folder that is being filled. The user has to remove what a killed backup leaves:
# outside of the home we cannot know whose a folder is.
PARTIAL_MARK = ".partial-"
MAX_SNAPSHOTS = 20  # taken while the daemon drops files that the last one names
DATABASE_NAME = "state/kedit.db"
HEAD_NAME = f"state/{event_log.HEAD_FILE}"
_TENSOR_FILE = re.compile(r"state/(generations|side)/([0-9a-f]{64})\.safetensors")
_PICTURE = re.compile(r"[0-9a-f]{32}")
# The files that a manifest may name: it may come from anywhere, and they are written into a home.
_ALLOWED_FILES = re.compile(
    rf"config\.toml|review\.yaml|{re.escape(DATABASE_NAME)}|{re.escape(HEAD_NAME)}|{_TENSOR_FILE.pattern}"
    rf"|state/pictures/{_PICTURE.pattern}"
    r"|state/kedit\.json|state/statistics-[0-9a-f]+(-[0-9a-f]{64})?\.safetensors"
)


@dataclass(frozen=True)
class Backup:
    """A complete backup: its folder and its manifest."""

    path: Path
    manifest: dict[str, Any]


def create_backup(home: Home, dest: Path, now: datetime) -> Backup:
    """Write a new folder `dest`, whole or not at all, whether the daemon runs or not.

    Raises KeditError: it cannot be written, or what is in the home could not be restored.
    """
    dest = dest.expanduser().absolute()
    _check_destination(home, dest)
    staged = dest.with_name(f".{dest.name}{PARTIAL_MARK}{secrets.token_hex(4)}")
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        try:
            staged.mkdir(FOLDER_MODE)
            _fill_backup(home, Home(staged), now)
            manifest = check_backup(staged).manifest
            staged.rename(dest)
            sync_folder(dest.parent)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    except OSError as error:
        raise KeditError(
            f"cannot back up to {dest}: {error.strerror or error}",
            code="backup",
            hint="choose a folder that you may write to, on a disk with free space",
        ) from error
    return Backup(dest, manifest)


def check_backup(folder: Path) -> Backup:
    """Return the backup in a folder, after comparing all its files with its manifest.

    Raises KeditError: something is missing or changed, or (78) a newer version has written it.
    """
    manifest = _read_manifest(folder)
    for name, sha in manifest["files"].items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise _damage_error(f"{path} is missing")
        if hash_file(path) != sha:
            raise _damage_error(f"{path} has changed")
    path = folder / DATABASE_NAME
    with _open_snapshot(path) as conn:
        schema.check_integrity(conn, path)
        schema.refuse_newer(conn, path)
        verdict = event_log.verify_chain(conn, event_log.read_head(folder / HEAD_NAME))
        if not verdict.intact:
            raise _damage_error(f"the chain in {path} is broken: {verdict.problem}")
        differing = {k for k, v in _describe_database(conn).items() if manifest.get(k) != v}
        named = _list_tensor_files(conn)
    if differing:
        entries = ", ".join(sorted(differing))
        raise _damage_error(f"{path} differs from {MANIFEST}: {entries}")
    if named != {n for n in manifest["files"] if _TENSOR_FILE.fullmatch(n)} | set(manifest["lost"]):
        raise _damage_error(f"{folder / MANIFEST} lists other tensor files than {path}")
    return Backup(folder, manifest)


def copy_file(source: Path, target: Path) -> str:
    """Copy a file durably and return the sha256 of the copy."""
    shutil.copy(source, target)  # with its mode: settings may be confidential
    with target.open("rb") as file:
        os.fsync(file.fileno())
    return hash_file(target)


def _check_destination(home: Home, dest: Path) -> None:
    if dest.resolve().is_relative_to(home.root.resolve()):
        hint = "choose a folder outside of it, best on another disk"
        raise KeditError(f"{dest} lies in the home", code="usage", hint=hint)
    if os.path.lexists(dest):
        hint = "a backup is a new folder: choose another name, such as one with the date"
        raise KeditError(f"{dest} exists already", code="exists", hint=hint)


def _fill_backup(home: Home, to: Home, now: datetime) -> None:
    for folder in (to.state_folder, to.generations_folder, to.side_folder, to.pictures_folder):
        folder.mkdir(FOLDER_MODE)
    lost = _copy_consistently(home, to)
    # After the database, which names none that is not there before.
    for path in home.pictures_folder.glob("*"):
        if _PICTURE.fullmatch(path.name):
            copy_file(path, to.pictures_folder / path.name)
    statistics = home.state_folder.glob("statistics-*.safetensors")
    settings = (home.config_file, home.review_file, home.state_folder / "kedit.json")
    for path in (*settings, *statistics):
        with suppress(FileNotFoundError):
            copy_file(path, to.root / path.relative_to(home.root))
    for path in (to.database_file, to.head_file):
        if path.exists():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    files = sorted(p for p in to.root.rglob("*") if p.is_file())
    with _open_snapshot(to.database_file) as conn:
        manifest = {
            "format": FORMAT,
            "created_at": format_utc(now, "seconds"),
            **_describe_database(conn),
            "lost": sorted(lost),
            "files": {str(p.relative_to(to.root)): hash_file(p) for p in files},
        }
    for folder in (to.generations_folder, to.side_folder, to.pictures_folder, to.state_folder):
        sync_folder(folder)
    text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    write_atomic(to.root / MANIFEST, text.encode())


def _copy_consistently(home: Home, to: Home) -> set[str]:
    """Copy the head, the database and the tensor files that it names; return those that are lost.

    A file that the daemon has dropped since the snapshot is not named by the next one; one that
    is still named was missing or damaged before, and the daemon rebuilds it.
    """
    missed: set[str] = set()
    for _ in range(MAX_SNAPSHOTS):
        with suppress(FileNotFoundError):
            # Before the database: the event that it anchors is in the chain of the snapshot.
            to.head_file.write_bytes(home.head_file.read_bytes())
        to.database_file.unlink(missing_ok=True)
        with open_database(home) as conn, closing(sqlite3.connect(to.database_file)) as snapshot:
            try:
                conn.backup(snapshot)  # all pages in one step: one state
                # One file, also for disks that are read-only.
                snapshot.execute("PRAGMA journal_mode=DELETE")
            except sqlite3.Error as error:
                if is_disk_full(error):  # the copy's disk: the home is only read
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
                raise
        with _open_snapshot(to.database_file) as conn:
            named = _list_tensor_files(conn)
        absent = {name for name in named if not _copy_tensor_file(home.root / name, to.root / name)}
        if absent <= missed:
            _delete_unnamed(to, named)
            return absent
        missed |= absent
    raise KeditError(
        f"the daemon has dropped files during each of {MAX_SNAPSHOTS} snapshots",
        code="busy",
        hint="try again when fewer facts come in",
    )


def _copy_tensor_file(source: Path, target: Path) -> bool:
    """Copy a tensor file, which is named by its sha256; False if it is missing or damaged."""
    if target.exists():
        return True
    with suppress(FileNotFoundError):
        if copy_file(source, target) == source.stem:
            return True
    target.unlink(missing_ok=True)
    return False


def _delete_unnamed(to: Home, named: set[str]) -> None:
    for path in (*to.generations_folder.iterdir(), *to.side_folder.iterdir()):
        if str(path.relative_to(to.root)) not in named:
            path.unlink()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = "name a folder that `kedit-daemon backup` has written"
        raise KeditError(f"{folder} is no backup", code="no-backup", hint=hint) from error
    except ValueError as error:
        raise _damage_error(f"{path} is not JSON") from error
    manifest = manifest if isinstance(manifest, dict) else {}
    files, lost = manifest.get("files"), manifest.get("lost")
    if (
        manifest.get("format") != FORMAT
        or not isinstance(files, dict)
        or not isinstance(lost, list)
    ):
        raise _damage_error(f"{path} is not of the format {FORMAT}")
    allowed = all(_ALLOWED_FILES.fullmatch(str(name)) for name in (*files, *lost))
    if DATABASE_NAME not in files or not allowed:
        raise _damage_error(f"{path} names other files than a backup has")
    return manifest


def _describe_database(conn: sqlite3.Connection) -> dict[str, Any]:
    """Return the manifest's entries about the database."""
    meta = dict(conn.execute("SELECT key, value FROM meta"))
    number = int(meta.get(meta_keys.ACTIVE_GENERATION) or 0)
    sql = "SELECT weights_hash FROM generations WHERE id = ?"
    weights = conn.execute(sql, (number,)).fetchone()
    head = event_log.read_newest_event(conn)
    states = conn.execute("SELECT state, count(*) FROM facts GROUP BY state ORDER BY state")
    counts = [conn.execute(f"SELECT count(*) FROM {table}") for table in ("generations", "shards")]
    return {
        "model": meta.get(meta_keys.MODEL),
        "base_sha256": meta.get(meta_keys.BASE_HASH),
        "generation": number,
        "weights_sha256": weights[0] if weights else None,
        "chain": {
            "seq": head.seq if head else 0,
            "hash": head.hash if head else event_log.GENESIS_HASH,
        },
        "facts": dict(states),
        **dict(zip(("generations", "shards"), (c.fetchone()[0] for c in counts), strict=True)),
    }


def _list_tensor_files(conn: sqlite3.Connection) -> set[str]:
    """List the tensor files that a database names, by their paths in a home."""
    found = set()
    for table, folder in (("generations", "generations"), ("shards", "side")):
        rows = conn.execute(f"SELECT sha256 FROM {table} WHERE sha256 IS NOT NULL")
        found |= {str(tensors_path(Path("state", folder), row[0])) for row in rows}
    return found


@contextmanager
def _open_snapshot(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a database that nobody writes to; reading it leaves no other files there."""
    uri = f"{path.absolute().as_uri()}?mode=ro&immutable=1"
    try:
        with closing(sqlite3.connect(uri, uri=True)) as conn:
            yield conn
    except sqlite3.Error as error:
        raise _damage_error(f"{path} cannot be read: {error}") from error


def _damage_error(damage: str) -> KeditError:
    hint = "if it is the home that is damaged: kedit-daemon doctor; else take an older backup"
    return KeditError(damage, code="corrupt", hint=hint)
