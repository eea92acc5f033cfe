"""The pictures of records: named by a path beside the file, or written out as a data URL."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from kedit_daemon.ingest.field_types import make_fault, quote_value
from kedit_daemon.ingest.plain_files import open_folder, read_at_most
from memory.errors import BadPicture, KeditError
from memory.facts import fill_subject
from memory.picture_files import (
    DATA_URL_MARK,
    MAX_PICTURE_BYTES,
    SUFFIXES,
    check_picture,
    read_data_url,
)
from memory.picture_marks import make_mark

ReadPicture = Callable[[str], bytes]
"""Takes the name that a record gives; raises BadPicture, or OSError."""

MAX_FILE_PICTURES = 1 << 28  # bytes of all pictures of a file, which are in memory together
COPY_PREFIX = "picture-"  # of the copies that `submit` puts into the inbox
HINT_BESIDE = "put the picture beside the file before the file itself, and hand the record in again"


class RecordPictures:
    """The pictures of one file's records, by their digests."""

    def __init__(self, read: ReadPicture | None) -> None:
        """read: reads a picture beside the file; None where there is no such place."""
        self._read = read
        self.found: dict[str, bytes] = {}
        self._byte_count = 0

    def take(self, given: object) -> str:
        """Read the picture that a record gives, and return its digest. Raises a fault of the
        field."""
        if not isinstance(given, str) or not given:
            raise make_fault('"image" must be a string', "write a path, or data:image/png;base64,…")
        try:
            data = read_data_url(given) if given.startswith(DATA_URL_MARK) else self._read_at(given)
            digest = check_picture(data)
        except KeditError as error:
            raise make_fault(f'"image": {error}', error.hint) from None
        except OSError as error:
            problem = f'"image": {quote_value(given)} cannot be read: {error.strerror or error}'
            raise make_fault(problem, HINT_BESIDE) from None
        self._byte_count += 0 if digest in self.found else len(data)
        if self._byte_count > MAX_FILE_PICTURES:
            problem = f'"image": the pictures of one file have more than {MAX_FILE_PICTURES} bytes'
            raise make_fault(problem, "hand the rest in as a file of its own")
        self.found[digest] = data
        return digest

    def _read_at(self, given: str) -> bytes:
        if self._read is None:
            hint = "write the picture out: data:image/png;base64,…"
            raise BadPicture("a path names nothing here", hint=hint)
        return self._read(given)


def state_picture(record: Mapping[str, object], digest: str) -> dict[str, object]:
    """Write a record about a picture in our own form: the picture is the subject, and stands before
    each text that does not say where. Prompts that are questions are learned as questions, too."""
    mark = make_mark(digest)
    stated = {key: value for key, value in record.items() if key != "image"} | {"subject": mark}
    for field in ("prompt", "paraphrases", "questions"):
        stated[field] = _place_picture(record.get(field))
    if not record.get("questions"):
        texts = [stated["prompt"], *_list(stated["paraphrases"])]
        stated["questions"] = [t for t in texts if isinstance(t, str) and t.strip().endswith("?")]
    if isinstance(near := record.get("neighbours"), list):
        stated["neighbours"] = [
            {**one, "prompt": fill_subject(one["prompt"], mark)}
            if isinstance(one, dict) and isinstance(one.get("prompt"), str)
            else one
            for one in near
        ]
    return {key: value for key, value in stated.items() if value is not None}


def _place_picture(value: object) -> object:
    """Put the picture's place before a text, or each of a list, that has none."""
    if isinstance(value, str):
        return value if "{}" in value or not value.strip() else f"{{}} {value}"
    return [_place_picture(one) for one in value] if isinstance(value, list) else value


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def read_from_inbox(inbox: Path, name: str) -> bytes:
    """Read a picture that lies in an inbox; nothing is followed. Raises BadPicture, OSError."""
    if "/" in name or name.startswith(".") or not name.lower().endswith(SUFFIXES):
        hint = f"name a file of the same folder that ends in {', '.join(SUFFIXES)}"
        raise BadPicture(f"{quote_value(name)} is no picture beside the file", hint=hint)
    with open_folder(inbox) as folder:
        return read_at_most(folder, name, MAX_PICTURE_BYTES + 1)


def read_from_folder(folder: Path, name: str) -> bytes:
    """Read a picture by its path from a folder on. Raises OSError."""
    with (folder / name).open("rb") as file:
        return file.read(MAX_PICTURE_BYTES + 1)


def name_copy(digest: str) -> str:
    """Return the name of a picture's copy in an inbox."""
    return f"{COPY_PREFIX}{digest}.png"


def find_copied(name: str) -> str | None:
    """Return the digest of the picture that a name is a copy's of."""
    found = re.fullmatch(rf"{COPY_PREFIX}([0-9a-f]{{32}})\.png", name)
    return found[1] if found else None
