"""What a crash leaves in a home: files that nothing names, and that nobody will ask for.

Only who holds the home's lock may take them away: to others, what a daemon is writing just now
looks the same.
"""

import re
import shutil
import sqlite3
from pathlib import Path

from kedit_daemon.home import Home
from memory.db import meta_keys
from memory.files import STAGED_NAME

# What lies in the folders of tensors: files that are named by their sha256, what `save_tensors` has
# not put in its place, and what safetensors, which writes in the same way, has not.
TENSOR_NAME = re.compile(
    rf"[0-9a-f]{{64}}\.safetensors|{STAGED_NAME.pattern}|\.tmp[0-9A-Za-z]{{6}}"
)
RESTORE_PREFIX = ".kedit-restore-"  # how the folder begins that a restore fills


def find_leftovers(home: Home, conn: sqlite3.Connection | None) -> list[Path]:
    """They are looked for by what the database names; without one only unfinished files are.

    Only names that are ours count, and the only folders are those of restores: somebody's
    `.snapshot` or `lost+found` stays.
    """
    # Without a database the restore was cut off, and the folder is how that is known.
    cut_off = not home.database_file.exists()
    found = [] if cut_off else [p for p in home.root.glob(f"{RESTORE_PREFIX}*") if p.is_dir()]
    for folder in (
        home.root,
        home.state_folder,
        home.inbox_folder / "failed",
        *_tensor_folders(home),
    ):
        found += _find_files(folder, STAGED_NAME)
    if conn is not None:
        for folder, sql in _tensor_folders(home).items():
            named = {f"{row[0]}.safetensors" for row in conn.execute(sql)}
            found += [
                p
                for p in _find_files(folder, TENSOR_NAME)
                if p.name not in named and p not in found
            ]
    return sorted(found)


def remove_leftovers(found: list[Path]) -> None:
    """Take them away. Raises OSError."""
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _find_files(folder: Path, names: re.Pattern[str]) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return [p for p in found if names.fullmatch(p.name) and p.is_file() and not p.is_symlink()]


def _tensor_folders(home: Home) -> dict[Path, str]:
    """The folders of tensor files, and what asks for the files that belong there."""
    return {
        home.generations_folder: "SELECT sha256 FROM generations",
        home.side_folder: "SELECT sha256 FROM shards",
        home.index_folder: f"SELECT value FROM meta WHERE key = '{meta_keys.INDEX_SHA256}'",
    }
