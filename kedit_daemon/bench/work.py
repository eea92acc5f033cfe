"""What a run keeps of its work, so that one that was cut off goes on where it was.

FILE.work/ beside the JSON file:

    options.json             what was asked for; a run with other options is refused
    <method>-<batch size>/   progress.json, the method's own files, and result.json in the end
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
REPLACED_OPTIONS = (
    "data",
    "model",
    "resume",
    "json_file",
    "plot",
)  # options that `options_of` replaces


@dataclass
class RunProgress:
    """How far a method has come with the stream. Seconds are those of its edits alone.

    seconds: of each batch that is settled. begun: what a batch that was cut off has taken so far,
    apart from a kill, which leaves no time to note it. parts: what all of them were spent on.
    """

    seconds: list[float] = field(default_factory=list)
    begun: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    not_edited: int = 0

    @classmethod
    def load(cls, folder: Path) -> "RunProgress":
        """What the folder tells; nothing is done yet where it tells nothing."""
        path = folder / PROGRESS_FILE
        return cls(**json.loads(path.read_bytes())) if path.is_file() else cls()

    def save(self, folder: Path) -> None:
        """Put it into the folder, in one piece."""
        _write_json(folder / PROGRESS_FILE, asdict(self))


def load_result(folder: Path) -> dict[str, Any] | None:
    """The result of a method that had come to its end."""
    path = folder / RESULT_FILE
    return dict(json.loads(path.read_bytes())) if path.is_file() else None


def save_result(folder: Path, result: Mapping[str, Any]) -> None:
    """Keep it: a method that has come to its end is not run again."""
    _write_json(folder / RESULT_FILE, result)


def _write_json(path: Path, value: object) -> None:
    write_atomic(path, json.dumps(value, indent=1).encode())


def describe_options(loaded: LoadedModel, data: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a run's outcome, from what the command was given: the data and the model by
    what is in them, wherever they lie and the result goes."""
    told = {name: value for name, value in given.items() if name not in REPLACED_OPTIONS}
    where = {"site": asdict(loaded.site), "model": loaded.base_hash}
    return told | where | {"data": hash_file(data)}


@contextmanager
def keep_work(
    json_file: Path | None, resume: bool, options: Mapping[str, Any]
) -> Iterator[Path | None]:
    """The folder for the work of a run that may be resumed; None when it keeps none.

    When the block is done so is the run, and the folder of this file's earlier run goes in any
    case. Raises KeditError when the folder holds the work of a run with other options.
    """
    if json_file is None:
        yield None
        return
    folder = json_file.absolute().with_name(f"{json_file.name}.work")
    if resume:
        _claim_folder(folder, options)
    yield folder if resume else None
    if (folder / OPTIONS_FILE).is_file():  # a folder of ours
        shutil.rmtree(folder)


def _claim_folder(folder: Path, options: Mapping[str, Any]) -> None:
    """Make the folder, or see that it is from a run like this one."""
    wanted = json.loads(json.dumps(options))  # tuples become lists, as in the file
    hint = f"give the options of that run, or remove {folder}"
    try:
        folder.mkdir(exist_ok=True)
        path = folder / OPTIONS_FILE
        if not any(folder.iterdir()):
            _write_json(path, wanted)
        known = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        why = f"{folder} is no work of a bench: {error}"
        raise KeditError(why, code="work", hint=hint) from error
    other = sorted(n for n in {*known, *wanted} if known.get(n) != wanted.get(n))
    if other:
        raise KeditError(
            f"{folder} was made by a run with another {', '.join(other)}", code="work", hint=hint
        )


@contextmanager
def open_method_folder(work: Path | None, name: str, batch_size: int) -> Iterator[Path]:
    """Where a method has its files: in the run's work, else in a folder that goes afterwards."""
    if work is None:
        with tempfile.TemporaryDirectory(prefix="kedit-bench-") as folder:
            yield Path(folder)
        return
    own = work / f"{name}-{batch_size}"
    own.mkdir(exist_ok=True)
    yield own
