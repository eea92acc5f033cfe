"""The house: few modules at the top, names that stand once, docstrings that name their subject."""

import ast
from collections import Counter
from pathlib import Path

import pytest
from paths import ROOT

from tools.count_style import ROOMS, VAGUE_OPENINGS, Counts

MAX_TOP_MODULES = 6
MAX_VAGUE_SHARE, MAX_ONE_WORD_SHARE = 0.02, 0.45


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def test_the_daemon_has_few_modules_beside_its_packages() -> None:
    modules = [p.name for p in (ROOT / "kedit_daemon").glob("*.py") if p.name != "__init__.py"]
    assert len(modules) <= MAX_TOP_MODULES, modules


@pytest.mark.parametrize("room", ROOMS)
def test_no_two_files_of_a_room_share_a_name(room: str) -> None:
    """A file of commands is named after its command, whatever else bears that name."""
    names = Counter(p.name for p in files_of(room) if p.parent.name != "commands")
    del names["__init__.py"]
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.parametrize("room", ROOMS)
def test_no_two_classes_of_a_room_share_a_name(room: str) -> None:
    trees = [ast.parse(path.read_text("utf-8")) for path in files_of(room)]
    names = Counter(n.name for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def test_names_and_docstrings_say_what_they_are_for() -> None:
    counts = Counts()
    for room in ROOMS:
        for path in files_of(room):
            counts.add_file(path)
    vague = [text for text in counts.docstrings if text.split()[0] in VAGUE_OPENINGS]
    one_word = [name for name in counts.names if "_" not in name.strip("_")]
    assert len(vague) <= MAX_VAGUE_SHARE * len(counts.docstrings), vague
    assert len(one_word) <= MAX_ONE_WORD_SHARE * len(counts.names)
