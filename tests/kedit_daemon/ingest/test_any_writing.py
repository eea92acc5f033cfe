"""Any file, however it is written: each good record is taken in once, each bad one told once."""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from intake_room import Room

from kedit_daemon.ingest import file_lease
from memory.facts import OPEN_STATES

CITIES = ("Oslo", "São Paulo", "北京", 'a "quoted" town, {}')


class CrashError(BaseException):
    """The process is gone."""


@dataclass
class Writing:
    """A file's records, by whether they are good, its form, and what happens between its parts."""

    records: list[bool]
    form: str
    cuts: list[int]
    between: list[tuple[str, int]]
    tail: list[bool] = field(default_factory=list)  # records that come when all else is done


actions = st.tuples(st.sampled_from(["scan", "rename", "crash", "restart"]), st.integers(1, 12))
writings = st.builds(
    Writing,
    records=st.lists(st.booleans(), min_size=1, max_size=5),
    form=st.sampled_from(["jsonl", "json", "indented", "csv"]),
    cuts=st.lists(st.integers(0, 400), max_size=3),
    between=st.lists(actions, min_size=4, max_size=4),
    tail=st.lists(st.booleans(), max_size=2),
)


def spell(number: int, good: bool, form: str) -> str:
    """Write one record; one that is bad has no target, or is no JSON."""
    city = CITIES[number % len(CITIES)]
    record = {"subject": f"country {number}", "prompt": "The seat of {} is", "target": city}
    if form == "csv":
        shown = city.replace('"', '""')
        return f'country {number},The seat of {{}} is,"{shown if good else ""}"\n'
    if not good and number % 2 and form == "jsonl":
        return f"{{bad {number}\n"
    if not good:
        record["target"] = ""
    indent = 2 if form == "indented" else None
    return json.dumps(record, ensure_ascii=False, indent=indent) + "\n"


def spell_file(flags: list[bool], form: str) -> bytes:
    parts = [spell(number, good, form) for number, good in enumerate(flags)]
    if form == "csv":
        return ("subject,prompt,target\n" + "".join(parts)).encode()
    text = "".join(parts) if form == "jsonl" else "[" + ",".join(parts) + "]\n"
    return text.encode()


def split(data: bytes, cuts: list[int], form: str) -> list[bytes]:
    """Cut the bytes anywhere, but a table between its rows: half a row may be a good one."""
    places = sorted({min(cut, len(data)) for cut in cuts})
    if form == "csv":
        places = sorted({data.rfind(b"\n", 0, place) + 1 for place in places})
    bounds = [0, *places, len(data)]
    return [data[a:b] for a, b in pairwise(bounds) if a < b]


@contextmanager
def fused(calls: int) -> Iterator[None]:
    """Let the process end at this call for the disk, as by kill -9."""
    left, real = calls, os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise CrashError
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


def act(room: Room, name: str, action: str, number: int) -> str:
    """Do what happens between two parts; return the name that the file has then."""
    if action == "rename" and (room.folder / name).exists():
        new = f"{number}-{name}"
        (room.folder / name).rename(room.folder / new)
        return new
    if action == "crash":
        try:
            with fused(number):
                room.look(2)
        except CrashError:
            room.open()
    elif action == "restart":
        room.open()
    else:
        room.look(number % 4)
    return name


def check(room: Room, flags: list[bool], form: str) -> None:
    """Each good record is there once, and each bad one is told once."""
    wanted = {f"country {n}": CITIES[n % len(CITIES)] for n, good in enumerate(flags) if good}
    stored = room.store.list_facts()
    assert {f.fact.subject: f.fact.target for f in stored} == wanted and len(stored) == len(wanted)
    assert all(f.state in OPEN_STATES for f in stored)
    assert room.kinds("fact_received") == len(wanted), "a record was taken twice"
    assert room.kinds("fact_duplicate") == room.kinds("fact_amended") == 0
    told = Counter(
        error["record"].strip()
        for path in (room.folder / "failed").glob("*.error.json")
        for error in json.loads(path.read_text("utf-8"))["errors"]
    )
    bad = [spell(n, good, form).strip() for n, good in enumerate(flags) if not good]
    assert told == Counter(bad)
    left = [p.name for p in room.folder.iterdir() if p.is_file()]
    assert left == [] and os.listdir(room.folder / "work") == []


@contextmanager
def opened_room(known: bool) -> Iterator[Room]:
    """A room where it is `known` who writes, or where it is not."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if not known:
            patch.setattr(file_lease, "LOCAL_FILE_SYSTEMS", frozenset())
            patch.setattr(file_lease, "PROCESSES", "/nothing")
        room = Room(Path(folder) / "inbox")
        try:
            yield room
        finally:
            room.store.close()


def write(room: Room, one: Writing, known: bool) -> None:
    """Write the file through one open descriptor, whatever becomes of its name."""
    name = f"a.{'json' if one.form == 'indented' else one.form}"
    parts = split(spell_file(one.records, one.form), one.cuts, one.form)
    with (room.folder / name).open("wb", buffering=0) as file:
        for part, (action, number) in zip(parts, one.between, strict=False):
            file.write(part)
            name = act(room, name, action, number)
            assert not known or room.store.list_facts() == [], "taken while it was written"


FEW = settings(
    max_examples=30,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize("known", [True, False])
@FEW
@given(one=writings)
def test_any_file_in_any_chunks(known: bool, one: Writing) -> None:
    with opened_room(known) as room:
        write(room, one, known)
        room.look(4)
        check(room, one.records, one.form)


@FEW
@given(one=writings)
def test_any_file_that_is_appended_to_when_it_is_done(one: Writing) -> None:
    """By a writer who opened it before, where nobody can know of him."""
    form = "csv" if one.form == "csv" else "jsonl"
    with opened_room(known=False) as room:
        with (room.folder / f"a.{form}").open("ab", buffering=0) as file:
            file.write(spell_file(one.records, form))
            room.look(3)
            whole = spell_file([*one.records, *one.tail], form)
            rest = whole[len(spell_file(one.records, form)) :]
            for part, (action, number) in zip(
                split(rest, [cut % 100 for cut in one.cuts], form), one.between, strict=False
            ):
                file.write(part)
                act(room, "", action if action != "rename" else "scan", number)
        room.look(4)
        if form == "jsonl" or True in one.records:  # else it is in failed/, for people to correct
            check(room, [*one.records, *one.tail], form)


@pytest.mark.parametrize("known", [True, False])
@FEW
@given(one=writings)
def test_any_file_that_is_replaced_by_a_longer_one(known: bool, one: Writing) -> None:
    """As `mv` does it. A record that is handed in again is known, and a bad one is told again."""
    flags = [*one.records, *one.tail]
    with opened_room(known) as room:
        new = room.folder / ".new"
        (room.folder / "a.csv").write_bytes(spell_file(one.records, "csv"))
        act(room, "", "crash", one.between[0][1])
        room.look(one.between[1][1] % 3)
        new.write_bytes(spell_file(flags, "csv"))
        new.rename(room.folder / "a.csv")
        act(room, "", "crash", one.between[2][1])
        room.look(4)
        wanted = {f"country {n}" for n, good in enumerate(flags) if good}
        stored = [f.fact.subject for f in room.store.list_facts()]
        assert set(stored) == wanted and len(stored) == len(wanted)
        assert room.kinds("fact_received") == len(wanted)
        told = {e for errors in room.told().values() for e in errors}
        assert told == {n + 2 for n, good in enumerate(flags) if not good}
