"""Records about pictures: by a path beside the file, or as a data URL; what is wrong is told."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny_vision_models import draw_picture

from kedit_daemon.config import Config
from kedit_daemon.ingest.inbox import Inbox
from kedit_daemon.ingest.intake import Intake
from kedit_daemon.ingest.parser import ParsedFile, parse_file
from kedit_daemon.ingest.record_pictures import find_copied, name_copy, read_from_folder
from kedit_daemon.ingest.schemas import FileLimits
from kedit_daemon.ingest.submit import prepare_submission, submit_to_inbox
from memory.picture_files import keep_picture, make_data_url, read_kept
from memory.picture_marks import make_digest, make_mark

LIMITS = FileLimits()
RED, BLUE = draw_picture(), draw_picture((20, 30, 220))
ASKED = {"prompt": "What is the name of this building?", "target": "Marram Tower"}


def lines(*records: dict[str, Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def parse(folder: Path, *records: dict[str, Any]) -> ParsedFile:
    return parse_file(lines(*records), "x.jsonl", None, LIMITS, partial(read_from_folder, folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tower.png").write_bytes(RED)
    return tmp_path


def test_the_picture_is_the_subject_and_stands_before_the_prompt(folder: Path) -> None:
    more = {
        "paraphrases": ["Which building is this?", "{} This is"],
        "neighbours": [{"prompt": "{} What colour is it?"}],
        "id": "t1",
    }
    parsed = parse(folder, {"image": "tower.png"} | ASKED | more)
    ((_, fact),) = parsed.facts
    mark = make_mark(make_digest(RED))
    assert parsed.pictures == {make_digest(RED): RED}
    assert (fact.subject, fact.picture) == (mark, make_digest(RED))
    assert fact.question == f"{mark} What is the name of this building?"
    assert fact.filled_paraphrases == (f"{mark} Which building is this?", f"{mark} This is")
    assert fact.filled_questions == (fact.question, fact.filled_paraphrases[0])
    assert fact.neighbours[0].prompt == f"{mark} What colour is it?"
    assert fact.external_id == "t1"


def test_a_data_url_and_a_path_give_the_same_fact(folder: Path) -> None:
    parsed = parse(folder, {"image": "tower.png"} | ASKED, {"image": make_data_url(RED)} | ASKED)
    (_, one), (_, other) = parsed.facts
    assert one == other


@pytest.mark.parametrize(
    ("image", "cause", "remedy"),
    [
        ("missing.png", "cannot be read", "before the file itself"),
        ("broken.png", "broken", "save it anew"),
        ("text.png", "not a picture", "PNG, JPEG"),
        ("", "must be a string", "data:image/png;base64"),
        (7, "must be a string", "data:image/png;base64"),
        ("data:image/png;base64,AAAA", "not a picture", "PNG, JPEG"),
        ("data:image/png,AAAA", "not one of data in base64", "data:image/png;base64"),
    ],
)
def test_a_picture_that_is_none_is_told_and_its_neighbours_are_kept(
    folder: Path, image: Any, cause: str, remedy: str
) -> None:
    (folder / "broken.png").write_bytes(RED[:60])
    (folder / "text.png").write_text("no picture")
    bad, good = {"image": image} | ASKED, {"image": "tower.png"} | ASKED
    parsed = parse(folder, good, bad, {"subject": "A", "prompt": "{} is in", "target": "Oslo"})
    assert [line for line, _ in parsed.facts] == [1, 3]
    (problem,) = parsed.problems
    assert problem.line == 2
    assert cause in problem.problem and '"image"' in problem.problem
    assert remedy in problem.remedy


def test_where_there_is_no_place_for_pictures_a_path_is_told() -> None:
    parsed = parse_file(lines({"image": "tower.png"} | ASKED), "x.jsonl", None, LIMITS)
    assert "a path names nothing here" in parsed.problems[0].problem
    assert "data:image/png" in parsed.problems[0].remedy


class Room:
    """An inbox with its intake, and a folder of pictures."""

    def __init__(self, root: Path, store: Any, now: Any) -> None:
        self.pictures, self.store, self.ticks = root / "pictures", store, 0.0
        self.inbox = Inbox(root / "inbox", 1.0, 100_000, now)
        self.intake = Intake(store, self.inbox, Config(), self.pictures)

    def look(self) -> None:
        for _ in range(3):
            self.ticks += 1.1
            for claim in self.inbox.claim_files(self.ticks):
                self.intake.take_file(claim)


@pytest.fixture
def room(tmp_path: Path, clock: Any) -> Any:
    from memory.db.store import Store

    (tmp_path / "inbox").mkdir()
    store = Store(tmp_path / "kedit.db", clock)
    yield Room(tmp_path, store, clock)
    store.close()


def test_a_watched_folder_takes_a_picture_beside_its_file(room: Room) -> None:
    (room.inbox.folder / "tower.png").write_bytes(RED)
    (room.inbox.folder / "facts.jsonl").write_bytes(lines({"image": "tower.png"} | ASKED))
    room.look()
    (fact,) = room.store.list_facts()
    assert read_kept(room.pictures, str(fact.fact.picture)) == RED
    assert (room.inbox.folder / "tower.png").exists()  # it is the user's
    assert (room.inbox.folder / "done" / "facts.jsonl").exists()
    assert not room.inbox.take_refusals()


@pytest.mark.parametrize("name", ["../tower.png", "/etc/passwd", "sub/tower.png", "facts.jsonl"])
def test_nothing_outside_of_the_inbox_is_read(room: Room, name: str) -> None:
    (room.inbox.folder.parent / "tower.png").write_bytes(RED)
    (room.inbox.folder / "facts.jsonl").write_bytes(lines({"image": name} | ASKED))
    room.look()
    assert not room.store.list_facts()
    report = json.loads((room.inbox.folder / "failed" / "facts.jsonl.error.json").read_text())
    assert "is no picture beside the file" in report["errors"][0]["problem"]


def test_a_link_to_a_picture_is_not_followed(room: Room) -> None:
    (room.inbox.folder.parent / "tower.png").write_bytes(RED)
    (room.inbox.folder / "tower.png").symlink_to(room.inbox.folder.parent / "tower.png")
    (room.inbox.folder / "facts.jsonl").write_bytes(lines({"image": "tower.png"} | ASKED))
    room.look()
    assert not room.store.list_facts()


def test_a_hand_in_brings_its_pictures_and_leaves_none_behind(room: Room, folder: Path) -> None:
    given = lines({"image": "tower.png"} | ASKED, {"image": make_data_url(BLUE)} | ASKED)
    read = partial(read_from_folder, folder)
    submission = prepare_submission(given, "facts.jsonl", None, LIMITS, read)
    submit_to_inbox(room.inbox.folder, submission)
    assert (room.inbox.folder / name_copy(make_digest(RED))).read_bytes() == RED
    room.look()
    kept = [fact.fact for fact in room.store.list_facts()]
    assert kept == submission.facts
    assert read_kept(room.pictures, make_digest(BLUE)) == BLUE
    assert not list(room.inbox.folder.glob("*.png"))

    submit_to_inbox(room.inbox.folder, submission)
    (room.inbox.folder / name_copy(make_digest(RED))).unlink()  # another hand-in's end took it
    room.look()
    assert len(room.store.list_facts()) == 2
    assert not list((room.inbox.folder / "failed").iterdir())


def test_a_copys_name_tells_its_picture() -> None:
    digest = make_digest(RED)
    assert find_copied(name_copy(digest)) == digest
    assert find_copied("tower.png") is None and find_copied(f"picture-{digest}.png/x") is None


def test_a_kept_picture_may_be_named_by_its_mark(room: Room) -> None:
    digest = keep_picture(room.pictures, RED)
    stated = {"subject": make_mark(digest), "prompt": "{} What is it?", "target": "a tower"}
    ((_, fact),) = parse_file(lines(stated), "x.jsonl", None, LIMITS).facts
    assert fact.picture == digest
