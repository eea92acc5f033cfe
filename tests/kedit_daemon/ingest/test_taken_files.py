"""Files that are written to after they were taken in: the rest is taken, or a problem is told."""

import json
import os
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from intake_room import Room

from kedit_daemon.ingest import file_lease


def line(number: int, target: str = "Oslo") -> str:
    record = {"subject": f"country {number}", "prompt": "The seat of {} is", "target": target}
    return json.dumps(record) + "\n"


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Room]:
    monkeypatch.setattr(file_lease, "LOCAL_FILE_SYSTEMS", frozenset())
    monkeypatch.setattr(file_lease, "PROCESSES", str(tmp_path / "nothing"))
    made = Room(tmp_path / "inbox")
    yield made
    made.store.close()


def test_the_rest_of_a_file_is_taken_when_it_comes(room: Room) -> None:
    with (room.folder / "a.jsonl").open("w") as file:
        for text in (line(1), line(2)[:20], line(2)[20:] + line(3)):
            file.write(text)
            file.flush()
            room.look()
    assert room.targets() == [f"{n} Oslo received" for n in (1, 2, 3)]
    assert room.told() == {} and os.listdir(room.folder / "failed") == []
    assert os.listdir(room.folder / "done") == ["a.jsonl"]
    assert room.kinds("fact_duplicate") == 0 and room.kinds("record_failed") == 1


def test_a_file_that_held_no_fact_yet_leaves_failed_when_it_does(room: Room) -> None:
    with (room.folder / "a.json").open("w") as file:
        file.write("[" + line(1)[:30])
        file.flush()
        room.look()
        assert list(room.told()) == ["a.json"]
        file.write(line(1)[30:] + "," + line(2) + "]")
    room.look()
    assert room.targets() == ["1 Oslo received", "2 Oslo received"]
    assert room.told() == {} and os.listdir(room.folder / "done") == ["a.json"]


def test_what_was_reverted_meanwhile_does_not_come_back_with_the_rest(room: Room) -> None:
    path = room.folder / "a.jsonl"
    path.write_text(line(1))
    room.look()
    (one,) = room.store.list_facts()
    with room.store.db.transaction():
        room.store.change_state(one.id, "reverted")
    with (room.folder / "done/a.jsonl").open("a") as file:
        file.write(line(2))
    room.look()
    assert room.targets() == ["1 Oslo reverted", "2 Oslo received"]


def test_bad_records_are_told_once(room: Room) -> None:
    (room.folder / "a.jsonl").write_text(line(1) + "{bad\n")
    room.look()
    assert room.told() == {"a.jsonl": [2]}
    with (room.folder / "done/a.jsonl").open("a") as file:
        file.write("{worse\n")
    room.look()
    assert room.told() == {"a.jsonl": [2, 3]} and room.kinds("record_failed") == 2
    shutil.rmtree(room.folder / "failed")
    (room.folder / "failed").mkdir()
    with (room.folder / "done/a.jsonl").open("a") as file:
        file.write(line(4) + "{worst\n")
    room.look()
    assert room.told() == {"a.jsonl": [5]} and room.kinds("record_failed") == 3


def test_a_row_that_was_cut_in_its_target_is_replaced_by_the_whole_one(room: Room) -> None:
    with (room.folder / "a.csv").open("w") as file:
        file.write("subject,prompt,target\ncountry 1,The seat of {} is,Lim")
        file.flush()
        room.look()
        file.write("assol\n")
    room.look()
    assert room.targets() == ["1 Lim superseded", "1 Limassol received"]
    assert room.told() == {}


def test_a_row_that_was_cut_elsewhere_is_told_with_its_fact(room: Room) -> None:
    with (room.folder / "a.csv").open("w") as file:
        file.write("target,prompt,subject\nLima,The seat of {} is,country 1")
        file.flush()
        room.look()
        file.write("2\n")
    room.look()
    assert room.targets() == ["1 Lima received", "12 Lima received"]
    (error,) = json.loads((room.folder / "failed/a.csv.error.json").read_text())["errors"]
    assert "before it was whole: The seat of country 1 is → Lima" in error["problem"]
    assert error["remedy"] == f"kedit-daemon revert {room.store.list_facts()[0].id}"


@pytest.mark.parametrize("new", ["", line(9), line(9) + line(1) + line(3)])
def test_a_file_that_is_another_in_done_is_told(room: Room, new: str) -> None:
    (room.folder / "a.jsonl").write_text(line(1) + "{bad\n")
    room.look()
    (room.folder / "done/a.jsonl").write_text(new)
    room.look()
    assert room.targets() == ["1 Oslo received"]
    assert sorted(room.told().values()) == [[1], [2]]
    (refusal,) = room.inbox.take_refusals()
    assert "changed after it had been taken in" in refusal.problem
    room.look()
    assert len(room.told()) == 2


def test_people_may_correct_what_is_in_failed(room: Room) -> None:
    (room.folder / "a.jsonl").write_text("{bad\n")
    room.look()
    (room.folder / "failed/a.jsonl").write_text(line(1))
    room.look()
    assert room.targets() == [] and room.told() == {"a.jsonl": [1]}


def test_a_crash_at_any_place_loses_nothing_of_the_rest(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    class CrashError(BaseException):
        pass

    steps = ["note_taken", "finish_claim", "fail_claim", "withdraw_report", "_move_to_work"]
    for number, step in enumerate(steps):
        path = room.folder / f"{number}.jsonl"
        path.write_text(line(number) + line(number + 20)[:30])
        room.look()
        with (room.folder / f"done/{number}.jsonl").open("a") as file:
            file.write(line(number + 20)[30:] + "{bad\n" * (step == "fail_claim"))

        def crash(*_: object, **__: object) -> None:
            raise CrashError

        with monkeypatch.context() as patch:
            patch.setattr(room.inbox, step, crash)
            with pytest.raises(CrashError):
                room.look()
        room.open()
        room.look()
    assert sorted(room.targets()) == sorted(
        f"{n} Oslo received" for number in range(5) for n in (number, number + 20)
    )
    assert room.told() == {"2.jsonl": [3]} and room.kinds("fact_duplicate") == 0
    assert len(os.listdir(room.folder / "done")) == 5


def test_notes_are_dropped_after_a_day_and_when_the_file_has_gone(room: Room) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (room.folder / name).write_text(line(1))
    room.look()
    assert len(os.listdir(room.folder / ".taken")) == 2
    (room.folder / "done/a.jsonl").unlink()
    room.look()
    assert len(os.listdir(room.folder / ".taken")) == 1
    (room.folder / ".taken/strange.json").write_text("[]")
    room.now += timedelta(days=2)
    room.open()
    room.look()
    assert os.listdir(room.folder / ".taken") == ["strange.json"]
