"""An export's folder: whole or absent, named by its content, left alone, pruned with care."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kedit_daemon.publish.export.folder import MANIFEST, STAGED_PREFIX, PlacedExport, place_export
from memory.errors import KeditError
from memory.files import hash_file


def make(
    dest: Path, text: str = "a", generation: int = 1, keep: int | None = None, **told: Any
) -> PlacedExport:
    def fill(to: Path) -> tuple[str, dict[str, Any]]:
        (to / "weights").write_text(text)
        (to / "weights").chmod(0o600)
        found = {"kind": "lora", "home": "h", "generation": generation} | told
        return f"m-gen-{generation}-lora", found

    return place_export(dest, keep, fill)


def test_the_folder_is_named_by_what_is_in_it_and_the_manifest_lists_it(tmp_path: Path) -> None:
    made = make(tmp_path / "new/dest", kind="delta")
    digest = hash_file(made.path / MANIFEST)
    assert made.path == tmp_path / "new/dest" / f"m-gen-1-lora-{digest[:12]}"
    assert json.loads((made.path / MANIFEST).read_bytes()) == made.manifest
    assert made.manifest["files"] == {"weights": hash_file(made.path / "weights")}
    assert len({path.stat().st_mode for path in made.path.iterdir()}) == 1
    assert (made.existed, made.removed, made.manifest["kind"]) == (False, (), "delta")


def test_an_identical_export_is_left_as_it_is(tmp_path: Path) -> None:
    first = make(tmp_path)
    before = os.stat(first.path / "weights")
    again = make(tmp_path)
    assert (again.path, again.existed) == (first.path, True)
    assert os.stat(first.path / "weights").st_ino == before.st_ino
    assert make(tmp_path, "b").path != first.path
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("harm", "what"),
    [
        (lambda path: (path / "weights").write_text("x"), "weights has changed"),
        (lambda path: (path / "weights").unlink(), "weights is missing"),
        (lambda path: (path / MANIFEST).write_text("{}"), "manifest.json has changed"),
        (lambda path: (path / MANIFEST).unlink(), "manifest.json is missing"),
    ],
)
def test_an_export_that_was_changed_is_told_and_not_touched(
    tmp_path: Path, harm: Callable[[Path], Any], what: str
) -> None:
    path = make(tmp_path).path
    harm(path)
    before = sorted(p.name for p in path.iterdir())
    with pytest.raises(KeditError, match=what):
        make(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert sorted(p.name for p in path.iterdir()) == before


def test_what_fails_leaves_nothing_and_what_a_crash_left_is_swept(tmp_path: Path) -> None:
    (tmp_path / f"{STAGED_PREFIX}0").mkdir()
    (tmp_path / f"{STAGED_PREFIX}0" / "half").write_text("half")

    def fill(to: Path) -> tuple[str, dict[str, Any]]:
        (to / "half").write_text("half")
        raise KeditError("no", code="empty")

    with pytest.raises(KeditError, match="no"):
        place_export(tmp_path, None, fill)
    assert not list(tmp_path.iterdir())


def test_a_destination_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KeditError, match="cannot export to") as caught:
        make(tmp_path / "file")
    assert caught.value.code == "export"


def test_keep_deletes_the_oldest_of_the_same_kind_and_home_alone(tmp_path: Path) -> None:
    old = [make(tmp_path, generation=n).path for n in (1, 2, 3)]
    others = [
        make(tmp_path, kind="merged", generation=1).path,
        make(tmp_path, home="other", generation=1).path,
    ]
    foreign = tmp_path / "m-gen-0-lora-000000000000"
    foreign.mkdir()
    (foreign / MANIFEST).write_text('{"kind": "lora", "home": "h", "generation": 0}')
    (tmp_path / "notes").mkdir()
    (tmp_path / "link").symlink_to(old[2])
    made = make(tmp_path, generation=4, keep=2)
    assert made.removed == (old[0].name, old[1].name)
    left = {p.name for p in tmp_path.iterdir()}
    assert left == {made.path.name, old[2].name, foreign.name, "notes", "link"} | {
        p.name for p in others
    }


def test_neither_the_newest_nor_what_was_asked_for_is_deleted(tmp_path: Path) -> None:
    newest, middle = (make(tmp_path, generation=n).path for n in (9, 5))
    made = make(tmp_path, generation=2, keep=1)
    assert made.removed == (middle.name,)
    assert {p.name for p in tmp_path.iterdir()} == {made.path.name, newest.name}
    assert make(tmp_path, generation=2, keep=1).removed == ()
    assert make(tmp_path, generation=10, keep=1).removed == (made.path.name, newest.name)
