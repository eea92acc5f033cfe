"""Damaged files are never served: they are made again as they were, or refused with a remedy."""

import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest
import torch
from damaged_home import BESIDE, KINDS, Made, end_of, made, opened, wrong
from promise_table import Tally
from side_tools import fact_numbers

from kedit_daemon.editing.model_loading import load_model
from memory.facts import FactState
from memory.side.index import KeyIndex

pytestmark = pytest.mark.timeout(280)

__all__ = ["made"]  # a fixture
FEW, MANY = 50, 200  # flips of each kind of file


def flip(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def flip_in(inside: Path, at: int, bit: int, root: Path) -> None:
    flip(root / inside, at, bit)


def flips(path: Path, count: int) -> Iterator[tuple[int, int]]:
    """The first and the last byte, and others drawn at random; with the bit that flips."""
    drawn, size = random.Random(path.parent.name), path.stat().st_size
    for n in range(count):
        yield {0: 0, 1: size - 1}.get(n, drawn.randrange(size)), drawn.randrange(8)


# Tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit(kind: str, made: Made, tmp_path: Path, tally: Tally, whole: bool) -> None:
    path, bad, refused = made.file(kind), list[str](), list[str]()
    count = MANY if whole else FEW
    # A shard is learned again, which takes long: of most it is only seen that it is not served.
    for n, (at, bit) in enumerate(flips(path, count)):
        if kind == "side" and n:
            found = served_damaged(made, tmp_path / "home", path, at, bit)
        else:
            damage = partial(flip_in, path.relative_to(made.root), at, bit)
            found = wrong(made, tmp_path / "home", damage, refused)
        bad += [found] if found else []
    tally.tried(count, bad=len(bad))
    assert (bad, refused) == ([], [])


def served_damaged(made: Made, root: Path, path: Path, at: int, bit: int) -> str:
    """What is wrong with how a damaged shard fares until its fact is learned again."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(made.root, root)
    flip(root / path.relative_to(made.root), at, bit)
    with opened(root, made.loaded) as home:
        found = [f.id for f in home.store.list_facts((FactState.RECEIVED,))]
        fired = {fired for _, fired in end_of(home).answers}
        shards = len(home.side.shards)
    right = found == [BESIDE[1].id] and BESIDE[1].id not in fired and shards == 1
    return "" if right else f"{found} {fired} {shards}"


CUTS: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: p.write_bytes(b""),
    "half": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "a byte less": lambda p: p.write_bytes(p.read_bytes()[:-1]),
    "a byte more": lambda p: p.write_bytes(p.read_bytes() + b"\0"),
    "missing": lambda p: p.unlink(),
}


def cut_in(inside: Path, cut: Callable[[Path], object], root: Path) -> None:
    cut(root / inside)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_cut_off_or_gone(
    kind: str, made: Made, tmp_path: Path, tally: Tally, whole: bool
) -> None:
    path, bad, refused = made.file(kind).relative_to(made.root), list[str](), list[str]()
    cuts = CUTS if whole or kind != "side" else {n: CUTS[n] for n in ("half", "missing")}
    for name, cut in cuts.items():
        found = wrong(made, tmp_path / "home", partial(cut_in, path, cut), refused)
        bad += [f"{name}: {found}"] if found else []
    tally.tried(len(cuts), bad=len(bad))
    assert (bad, refused) == ([], [])


@pytest.mark.parametrize("kind", ["generations", "side"])
def test_two_files_that_are_swapped(kind: str, made: Made, tmp_path: Path) -> None:
    one, two = (made.file(kind, n).relative_to(made.root) for n in (0, 1))

    def swap(root: Path) -> None:
        (root / one).rename(root / "kept")
        (root / two).rename(root / one)
        (root / "kept").rename(root / two)

    assert wrong(made, tmp_path / "home", swap, []) == ""


def test_an_index_that_belongs_to_another_moment(made: Made, tmp_path: Path) -> None:
    """Its file is whole, and the keys in it are not those that the store has."""

    def change(root: Path) -> None:
        index = KeyIndex.load(root / "state/index", made.file("index").stem)
        for number in fact_numbers(index):
            index.add(number, torch.ones(1, index.width))
        sha = index.save(root / "state/index")
        with closing(sqlite3.connect(root / "state/kedit.db")) as conn, conn:
            conn.execute("UPDATE meta SET value = ? WHERE key = 'index_sha256'", (sha,))

    assert wrong(made, tmp_path / "home", change, []) == ""


def test_everything_derived_is_gone_at_once(made: Made, tmp_path: Path) -> None:
    def clear(root: Path) -> None:
        for path in (root / "state").glob("*/*.safetensors"):
            path.unlink()
        (root / "state/audit.head").unlink()

    assert wrong(made, tmp_path / "home", clear, []) == ""


def test_statistics_are_measured_again(
    made: Made, tmp_path: Path, tally: Tally, whole: bool
) -> None:
    (path,) = made.root.parent.glob("statistics-*.safetensors")
    count, bad = (20 if whole else 1), 0
    for at, bit in flips(path, count):
        shutil.copy(path, tmp_path / path.name)
        flip(tmp_path / path.name, at, bit)
        load_model(made.loaded.name, "cpu", tmp_path, iter)
        (again,) = tmp_path.glob("statistics-*")
        bad += (again.name, again.read_bytes()) != (path.name, path.read_bytes())
    tally.tried(count, bad=bad)
    assert bad == 0
