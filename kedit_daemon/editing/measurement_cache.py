"""Files of what is measured once for a model, kept in a home's `state` folder.

A file's name holds its kind, a key of all that the measurement depends on, and the sha256 of its
content, which shows a later start that it is whole.
"""

import hashlib
import json
import logging
import shutil
from pathlib import Path

from memory.files import hash_file, write_atomic

log = logging.getLogger(__name__)


def make_key(*parts: object) -> str:
    """Compute the key of a measurement from JSON values: 16 hex digits."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def list_measured(folder: Path, kind: str, key: str = "") -> list[Path]:
    """List the files of a kind, and of a key if one is given."""
    return sorted(folder.glob(f"{kind}-{key or '*'}-*.safetensors"))


def find_measured(folder: Path, kind: str, key: str) -> Path | None:
    """Find the file of a measurement, if it is there and whole."""
    for path in list_measured(folder, kind, key):
        if hash_file(path) == path.stem.rpartition("-")[2]:
            return path
        log.warning("%s is damaged: its sha256 differs. Measuring the model again.", path)
    return None


def save_measured(
    folder: Path, kind: str, key: str, data: bytes, most_kept: int | None = None
) -> Path:
    """Write the file of a measurement, and return its path. Damaged ones of this key are removed,
    and the oldest of other keys, so that `most_kept` of this kind stay. Raises OSError."""
    path = folder / f"{kind}-{key}-{hashlib.sha256(data).hexdigest()}.safetensors"
    write_atomic(path, data)
    gone = set(list_measured(folder, kind, key)) - {path}
    if most_kept is not None:
        by_age = sorted(list_measured(folder, kind), key=lambda p: p.stat().st_mtime_ns)
        gone.update(by_age[:-most_kept])
    for other in gone:
        other.unlink(missing_ok=True)
    return path


def copy_measured(source: Path, dest: Path) -> None:
    """Copy the files of measurements to another home's folder: of the same model, they are the
    same."""
    for path in source.glob("*-*-*.safetensors"):
        shutil.copy2(path, dest)
