"""Files that a crash leaves in a home: nothing refers to them.

Only the holder of the home's lock may remove them: a file that a daemon is writing looks the same.
"""

import re
import shutil
import sqlite3
from pathlib import Path

from kedit_daemon.home import Home
from memory.db import meta_keys
from memory.files import STAGED_NAME

# Names in the folders of tensors: files by their sha256, and those that `save_tensors`, or
# safetensors itself, has not renamed yet.
TENSOR_NAME = re.compile(
    rf"[0-9a-f]{{64}}\.safetensors|{STAGED_NAME.pattern}|\.tmp[0-9A-Za-z]{{6}}"
)
RESTORE_PREFIX = ".kedit-restore-"  # of the name of the folder that a restore fills


def find_leftovers(home: Home, conn: sqlite3.Connection | None) -> list[Path]:
    """Return the files that the database does not name; without one, only unfinished files.

    Only names of ours count, and the only folders are those of restores: somebody's `.snapshot`
    or `lost+found` stays.
    """
    # Without a database a restore was cut off, and is recognised by its folder.
    cut_off = not home.database_file.exists()
    found = {p for p in home.root.glob(f"{RESTORE_PREFIX}*") if p.is_dir() and not cut_off}
    queries = _tensor_folders(home)
    inbox = (home.inbox_folder / name for name in ("failed", ".taken"))
    for folder in (home.root, home.state_folder, *inbox, *queries):
        found.update(_find_files(folder, STAGED_NAME))
    if conn is not None:
        for folder, sql in queries.items():
            named = {f"{row[0]}.safetensors" for row in conn.execute(sql)}
            found.update(p for p in _find_files(folder, TENSOR_NAME) if p.name not in named)
    return sorted(found)


def remove_leftovers(found: list[Path]) -> None:
    """Delete them. Raises OSError."""
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _find_files(folder: Path, names: re.Pattern[str]) -> list[Path]:
    paths = folder.iterdir() if folder.is_dir() else ()
    return [p for p in paths if names.fullmatch(p.name) and p.is_file() and not p.is_symlink()]


def _tensor_folders(home: Home) -> dict[Path, str]:
    """Return the folders of tensor files, each with the query for the files that belong there."""
    return {
        home.generations_folder: "SELECT sha256 FROM generations",
        home.side_folder: "SELECT sha256 FROM shards",
        home.index_folder: f"SELECT value FROM meta WHERE key = '{meta_keys.INDEX_SHA256}'",
    }
