"""Live facts that are asked in a chat afterwards, and learned again, by a tiny model."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from editing_home import CHAT_TEMPLATE, Bench, seat

from kedit_daemon.editing import side_learner
from kedit_daemon.report.render import render_fact_detail
from memory.db.queries import fetch_fact_detail, open_readonly
from memory.facts import Fact, FactState
from memory.model.chat_layout import render_chat
from memory.model.editable import EditableModel
from policies.asking.asked_rows import make_asked_rows
from policies.prompts import TokenRow

ASKED = "Which city is the seat of country 1?"
ONE = seat(1, "Oslo", questions=("Which city is the seat of {}?",))
# No name is an answer to it.
UNMEANT = seat(4, "Nuuk", questions=("When was {} founded?",))


@pytest.fixture
def at(bench: Callable[..., Bench]) -> Bench:
    made = bench(side={"steps": 300})
    made.served.model.tokenizer.chat_template = CHAT_TEMPLATE
    made.served.restore_again()  # a template is read when a side memory is made
    return made


def read_chat(at: Bench, fact: Fact) -> dict[str, Any] | None:
    return (at.store.require_fact(fact.id).probe or {}).get("chat")


def read_shard(at: Bench) -> str:
    (row,) = at.store.artifacts.list_shards()
    assert [path.stem for path in at.home.side_folder.iterdir()] == [row.sha256]
    return row.sha256


def read_events(at: Bench) -> list[dict[str, Any]]:
    rows = at.store.db.conn.execute("SELECT data FROM events WHERE kind = 'chat_probed'")
    return [json.loads(data) for (data,) in rows]


def show(at: Bench, fact: Fact) -> str:
    found = fetch_fact_detail(open_readonly(at.home.database_file), fact.id)
    assert found is not None
    return next((x.strip() for x in render_fact_detail(found) if x.startswith("  chat ")), "")


def says_in_chat(at: Bench) -> str:
    prompt = render_chat(at.served.model.tokenizer, [{"role": "user", "content": ASKED}])
    return at.served.answer_prompts([prompt], 3)[0].text


Rows = Callable[[EditableModel, Fact, Sequence[str]], list[TokenRow]]


def learn_rows(monkeypatch: pytest.MonkeyPatch, rows: Rows = make_asked_rows) -> None:
    monkeypatch.setattr(side_learner, "make_asked_rows", rows)


def answer_otherwise(model: EditableModel, fact: Fact, questions: Sequence[str]) -> list[TokenRow]:
    """Rows from which a fact learns another answer than its target."""
    return make_asked_rows(model, replace(fact, target="Rome"), questions)


@pytest.fixture
def bad(at: Bench, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A home with a fact that is live, was asked in a chat, and not answered."""
    learn_rows(monkeypatch, answer_otherwise)
    at.receive(ONE)
    assert at.editor.step() and at.editor.step()
    learn_rows(monkeypatch)
    return at


def test_a_fact_is_live_before_it_is_asked_once(at: Bench) -> None:
    at.receive(ONE)
    assert at.editor.step()
    assert at.store.require_fact(ONE.id).state is FactState.LIVE_SIDE
    assert (read_chat(at, ONE), show(at, ONE)) == (None, "")
    assert at.editor.step()
    chat = read_chat(at, ONE)
    assert chat is not None
    assert (chat["questions"], chat["answered"], chat["failed"]) == (1, 1, [])
    assert (chat["relearning"], chat["shard"], read_events(at)) == (None, read_shard(at), [])
    assert show(at, ONE) == "chat         answered 1 of 1 questions"
    assert not at.editor.step()
    at.restart()
    assert not at.editor.step()


def test_a_fact_that_was_amended_or_moved_is_asked_again(at: Bench) -> None:
    at.receive(ONE)
    at.settle()
    with at.store.db.transaction():
        at.store.amend_fact(replace(ONE, other_targets=("Christiania",)), "a.jsonl", 1)
    assert read_chat(at, ONE) is None
    assert at.editor.step() and read_chat(at, ONE) is not None
    more = replace(ONE, questions=(*ONE.questions, "What is the seat of {}?"))
    with at.store.db.transaction():
        at.store.amend_fact(more, "a.jsonl", 1)
        at.store.mark_amended([ONE.id])
    at.settle()
    chat = read_chat(at, ONE)
    assert chat is not None and (chat["questions"], chat["shard"]) == (2, read_shard(at))
    at.editor.run_flush(dry_run=False)
    assert at.store.require_fact(ONE.id).state is FactState.LIVE_WEIGHTS
    assert read_chat(at, ONE) is None
    at.settle()
    assert read_chat(at, ONE) is not None
    for path in at.home.side_folder.iterdir():
        path.unlink()
    at.restart()
    at.settle()  # another shard, over weights that have moved since
    again = read_chat(at, ONE)
    assert again is not None and again["shard"] == read_shard(at) != chat["shard"]


def test_a_fact_is_learned_again_from_the_failed_questions_too(
    at: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[list[str]]()

    def watch(model: EditableModel, fact: Fact, questions: Sequence[str]) -> list[TokenRow]:
        asked.append(list(questions))
        return make_asked_rows(model, fact, questions)

    learn_rows(monkeypatch, watch)
    learner, fact = at.editor.side_learner, Fact("country 5", "The capital of {} is", "Lima")
    learner.train_again(fact, [])
    usual = at.pulses
    # Another loss ends the training: here a larger one, since this model reaches none so low.
    monkeypatch.setattr(side_learner, "AGAIN_DONE_LOSS", 5.0)
    learner.train_again(fact, [asked[0][1]])
    assert at.pulses - usual < usual
    learner.train_again(fact, ["Which city rules country 5?"])
    first, second, *others = asked[0]
    expected = [[second, first, *others], ["Which city rules country 5?", *asked[0]]]
    assert asked[1:] == expected


def test_a_fact_that_is_not_answered_is_told_and_learned_again(bad: Bench) -> None:
    chat, first = read_chat(bad, ONE), read_shard(bad)
    assert chat is not None and chat["relearning"] == "waits"
    (failed,) = chat["failed"]
    assert (failed["question"], failed["fired"]) == (ASKED, True)
    assert f'not yet answered when asked in a chat: "{ASKED}" → ' in show(bad, ONE)
    assert not says_in_chat(bad).startswith("Oslo")
    bad.restart()
    assert bad.editor.step()
    stored, chat, second = bad.store.require_fact(ONE.id), read_chat(bad, ONE), read_shard(bad)
    assert chat is not None and second != first
    assert (chat["relearning"], chat["failed"], chat["shard"]) == ("done", [], second)
    assert stored.probe is not None and (stored.state, stored.probe["right"]) == (
        FactState.LIVE_SIDE,
        True,
    )
    assert [event["relearning"] for event in read_events(bad)] == ["waits", "done"]
    assert show(bad, ONE) == "chat         answered 1 of 1 questions, since it was learned again"
    for _ in range(2):
        assert says_in_chat(bad).startswith("Oslo")
        assert bad.says(ONE.question) == "Oslo"
        assert not bad.editor.step()
        bad.restart()


def learn_badly_again(at: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    learn_rows(monkeypatch, answer_otherwise)


def let_training_diverge(at: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    at.served.site = replace(at.served.site, side_rate=1e6)


def let_training_end_early(at: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    at.editor.side_learner.steps = 1


def let_training_raise(at: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> list[TokenRow]:
        raise RuntimeError("no such device")

    learn_rows(monkeypatch, refuse)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (learn_badly_again, "no more questions"),
        (let_training_diverge, ""),
        (let_training_end_early, "the side memory answered"),
        (let_training_raise, "no such device"),
    ],
)
def test_a_shard_that_is_no_better_does_not_take_the_place_of_the_first(
    bad: Bench,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Bench, pytest.MonkeyPatch], None],
    reason: str,
) -> None:
    chat, shard, said = read_chat(bad, ONE), read_shard(bad), says_in_chat(bad)
    harm(bad, monkeypatch)
    assert bad.editor.step()
    assert chat is not None and read_chat(bad, ONE) == {**chat, "relearning": "failed"}
    assert (read_shard(bad), says_in_chat(bad)) == (shard, said)
    assert list(bad.served.side.shards) == [1]
    assert reason in read_events(bad)[-1]["reason"]
    assert "also when learned again" in show(bad, ONE)
    assert not bad.editor.step()  # once
    bad.restart()
    assert (bad.says(ONE.question), bad.editor.step()) == ("Oslo", False)


def test_a_crash_while_the_shard_is_replaced_leaves_the_first(
    bad: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat, said = read_chat(bad, ONE), says_in_chat(bad)

    def fail(*_: Any) -> int:
        raise OSError("the disk is gone")

    monkeypatch.setattr(bad.store, "add_edit", fail)
    with pytest.raises(OSError, match="gone"):
        bad.editor.step()
    for _ in range(2):
        assert (read_chat(bad, ONE), says_in_chat(bad)) == (chat, said)
        bad.restart()
    read_shard(bad)
    bad.settle()
    assert says_in_chat(bad).startswith("Oslo")


def test_a_fact_that_ends_meanwhile_is_left_alone(bad: Bench) -> None:
    def end_fact() -> None:
        if bad.store.require_fact(ONE.id).state is FactState.LIVE_SIDE:
            with bad.store.db.transaction():
                bad.store.artifacts.drop_side_keys(ONE.id)
                bad.store.change_state(ONE.id, FactState.REVERTED, reason="test")

    bad.editor.side_learner.pulse = end_fact
    bad.settle()
    assert bad.store.require_fact(ONE.id).state is FactState.REVERTED
    assert [row.id for row in bad.store.artifacts.list_shards()] == list(bad.served.side.shards)
    assert list(bad.served.side.shards) == [1]  # of the fact: whoever ends it takes it out
    assert [event["relearning"] for event in read_events(bad)] == ["waits"]
    assert show(bad, ONE) == ""


def test_a_fact_that_does_not_fire_is_told_and_not_learned_again(at: Bench) -> None:
    at.receive(UNMEANT)
    assert at.editor.step()
    shard = read_shard(at)
    at.settle()
    chat = read_chat(at, UNMEANT)
    assert chat is not None and chat["relearning"] is None
    assert [one["fired"] for one in chat["failed"]] == [False]
    assert (read_shard(at), len(read_events(at))) == (shard, 1)
    assert "its words did not fire the fact" in show(at, UNMEANT)


def test_a_shard_that_has_learned_no_question_is_learned_again(
    at: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn_rows(monkeypatch, lambda *_: [])
    at.receive(ONE)
    assert at.editor.step() and not at.served.side.is_asked(ONE.id)
    learn_rows(monkeypatch)
    at.settle()
    assert says_in_chat(at).startswith("Oslo")


def test_facts_that_cannot_be_asked_stay_live_and_are_not_tried_at_every_turn(at: Bench) -> None:
    at.receive(ONE)
    assert at.editor.step()
    at.served.model.tokenizer.chat_template = None
    at.settle()
    assert read_chat(at, ONE) is None
    at.served.model.tokenizer.chat_template = CHAT_TEMPLATE
    at.restart()
    at.settle()
    assert read_chat(at, ONE) is not None


def test_no_fact_is_asked_where_the_model_has_no_template(bench: Callable[..., Bench]) -> None:
    at = bench(side={"steps": 300})
    at.receive(ONE)
    assert at.editor.step() and not at.editor.step()
    assert read_chat(at, ONE) is None
