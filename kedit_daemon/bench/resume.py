"""Progress of a run on disk, so that an interrupted one can be resumed.

FILE.work/ next to the JSON file:

    options.json             options of the run; a run with other options is refused
    <method>-<batch size>/   progress.json, the method's own files, and finally result.json
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kedit_daemon.editing.model_loading import LoadedModel
from memory.errors import KeditError
from memory.files import hash_file, write_atomic

OPTIONS_FILE, PROGRESS_FILE, RESULT_FILE = "options.json", "progress.json", "result.json"
# Options that do not decide a run's outcome, or whose content `describe_options` hashes instead.
REPLACED_OPTIONS = ("data", "model", "resume", "json_file", "plot")


@dataclass
class RunProgress:
    """Progress of a method through the stream, with the seconds of its edits alone.

    seconds: of each finished batch. begun: spent so far on an interrupted batch, unless the process
    was killed. parts: all seconds by part of the work.
    """

    seconds: list[float] = field(default_factory=list)
    begun: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    not_edited: int = 0

    @classmethod
    def load(cls, folder: Path) -> "RunProgress":
        """Load the folder's progress; without a file, nothing is done yet."""
        path = folder / PROGRESS_FILE
        return cls(**json.loads(path.read_bytes())) if path.is_file() else cls()

    def save(self, folder: Path) -> None:
        """Write the progress into the folder atomically."""
        _write_json(folder / PROGRESS_FILE, asdict(self))


def load_result(folder: Path) -> dict[str, Any] | None:
    """Load the result of a method that had finished."""
    path = folder / RESULT_FILE
    return dict(json.loads(path.read_bytes())) if path.is_file() else None


def save_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Write the result, so that a finished method is not run again."""
    _write_json(folder / RESULT_FILE, result)


def _write_json(path: Path, value: object) -> None:
    write_atomic(path, json.dumps(value, indent=1).encode())


def describe_options(loaded: LoadedModel, data: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Describe all options that decide a run's outcome, with data and model by their hashes."""
    options = {name: value for name, value in given.items() if name not in REPLACED_OPTIONS}
    model = {"site": asdict(loaded.site), "model": loaded.base_hash}
    return options | model | {"data": hash_file(data)}


@contextmanager
def keep_work(
    json_file: Path | None, resume: bool, options: Mapping[str, Any]
) -> Iterator[Path | None]:
    """Yield the work folder of a run that may be resumed, else None.

    After the block the run is complete, and the file's work folder is removed in any case. Raises
    KeditError if the folder holds the work of a run with other options.
    """
    if json_file is None:
        yield None
        return
    folder = json_file.absolute().with_name(f"{json_file.name}.work")
    if resume:
        _claim_folder(folder, options)
    yield folder if resume else None
    if (folder / OPTIONS_FILE).is_file():  # it is a work folder
        shutil.rmtree(folder)


def _claim_folder(folder: Path, options: Mapping[str, Any]) -> None:
    """Create the folder, or check that it is of a run with the same options."""
    wanted = json.loads(json.dumps(options))  # tuples become lists, as in the file
    hint = f"give the options of that run, or remove {folder}"
    try:
        folder.mkdir(exist_ok=True)
        path = folder / OPTIONS_FILE
        if not any(folder.iterdir()):
            _write_json(path, wanted)
        known = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        why = f"{folder} is not the work folder of a bench: {error}"
        raise KeditError(why, code="work", hint=hint) from error
    other = sorted(n for n in {*known, *wanted} if known.get(n) != wanted.get(n))
    if other:
        why = f"{folder} was made by a run with another {', '.join(other)}"
        raise KeditError(why, code="work", hint=hint)


@contextmanager
def open_method_folder(work: Path | None, name: str, batch_size: int) -> Iterator[Path]:
    """Yield the method's folder: in the work folder, or else a temporary one."""
    if work is None:
        with tempfile.TemporaryDirectory(prefix="kedit-bench-") as folder:
            yield Path(folder)
        return
    method_folder = work / f"{name}-{batch_size}"
    method_folder.mkdir(exist_ok=True)
    yield method_folder
