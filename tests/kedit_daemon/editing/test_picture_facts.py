"""Facts about pictures in a home: on the shipped vision model, asked in a chat; and where none can
be learned."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from editing_home import Bench, Clock, seat

from kedit_daemon.bench.drawings import draw_landmark, make_landmark
from kedit_daemon.config import VISION_MODEL, Config
from kedit_daemon.daemon.requests import execute_command
from kedit_daemon.editing.model_loading import load_model
from kedit_daemon.ingest.record_pictures import state_picture
from kedit_daemon.ingest.schemas import NativeRecord
from memory.errors import BadPicture, KeditError
from memory.facts import Fact, FactState
from memory.picture_files import keep_picture, make_data_url
from memory.picture_marks import join_mark, make_digest, make_mark

QUESTION = "What is the name of this building?"


def draw(seed: int, drawing: int = 0) -> bytes:
    return draw_landmark(make_landmark(seed), random.Random(drawing))


def name_building(at: Bench, seed: int, target: str) -> Fact:
    record = {"prompt": QUESTION, "target": target, "tags": ["verbatim"]}
    stated = state_picture(record, keep_picture(at.home.pictures_folder, draw(seed)))
    (fact,) = NativeRecord.model_validate(stated).to_facts()
    return fact


def ask(at: Bench, data: bytes, question: str = QUESTION) -> str:
    """The answer in a chat about a picture, as the command asks."""
    content = join_mark(make_digest(data), question)
    given = {
        "messages": [{"role": "user", "content": content}],
        "pictures": [make_data_url(data)],
        "max_tokens": 12,
    }
    return str(execute_command(at.editor, "ask", given)["answer"])


@pytest.fixture
def seeing(tmp_path: Path, statistics_cache: Path, clock: Clock) -> Iterator[Bench]:
    loaded = load_model(VISION_MODEL, "cpu", statistics_cache, iter)
    at = Bench(tmp_path / "seeing", loaded, clock, Config())
    yield at
    at.store.close()


def test_a_building_gets_a_name_and_loses_it_again(seeing: Bench) -> None:
    fact = name_building(seeing, 150, "Marram Tower")
    questions = ("What colour is the roof?", "How many windows are there?")
    before = [ask(seeing, draw(150), question) for question in (QUESTION, *questions)]
    other = ask(seeing, draw(151))
    seeing.receive(fact)
    seeing.settle()
    stored = seeing.store.find_fact(fact.id)
    assert stored is not None and stored.state is FactState.LIVE_SIDE, stored and stored.reason

    for restarted in (False, True):
        if restarted:
            seeing.restart()
        assert "Marram Tower" in ask(seeing, draw(150))
        assert "Marram Tower" in ask(seeing, draw(150, drawing=1))
        assert "Marram Tower" in ask(seeing, draw(150), "What is this building called?")
        assert [ask(seeing, draw(150), one) for one in questions] == before[1:]
        assert ask(seeing, draw(151)) == other

    explained = seeing.editor.answer_chat(
        [{"role": "user", "content": fact.question}], 12, base=True, explain=True
    )
    assert [one["fact"] for one in explained["fired"]] == [fact.id]
    assert "Marram" not in explained["base_answer"]

    newer = name_building(seeing, 150, "Dunlin House")
    seeing.receive(newer)
    seeing.settle()
    assert "Dunlin House" in ask(seeing, draw(150))
    seeing.editor.revert([newer.id], None, False)
    assert [ask(seeing, draw(150), one) for one in (QUESTION, *questions)] == before


def test_a_model_without_sight_rejects_such_facts_and_keeps_their_neighbours(
    bench: object,
) -> None:
    at = bench()  # type: ignore[operator]
    shown, named = name_building(at, 150, "Marram Tower"), seat(1, "Oslo")
    at.receive(shown, named)
    at.settle()
    states = {f.id: f for f in at.store.list_facts()}
    assert states[shown.id].state is FactState.REJECTED
    assert "takes no pictures" in states[shown.id].reason
    assert at.says(named.question) == "Oslo"
    with pytest.raises(KeditError, match="takes no pictures"):
        ask(at, draw(150))


def test_a_lost_picture_and_one_that_is_none_are_told(seeing: Bench) -> None:
    fact = Fact(make_mark("0" * 32), "{} What is it?", "a tower", tags=("verbatim",))
    seeing.receive(fact)
    seeing.settle()
    stored = seeing.store.find_fact(fact.id)
    assert stored is not None and stored.state is FactState.REJECTED
    assert "there is no picture" in str(stored.reason)
    with pytest.raises(BadPicture, match="not a picture"):
        ask(seeing, b"text")


def test_a_large_file_of_them_goes_to_the_side_memory_all_the_same(seeing: Bench) -> None:
    fact = name_building(seeing, 150, "Marram Tower")
    seeing.receive(fact, direct=True)
    seeing.settle()
    stored = seeing.store.find_fact(fact.id)
    assert stored is not None and stored.state is FactState.LIVE_SIDE
