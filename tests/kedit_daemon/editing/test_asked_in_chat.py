"""Facts that are asked for in a chat, by a tiny model with a chat template."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from editing_home import CHAT_TEMPLATE, LOOSE, Bench, Clock, seat

from kedit_daemon.config import Config
from kedit_daemon.daemon.requests import execute_command
from kedit_daemon.editing.model_loading import CanaryTexts, load_model, read_canary_texts
from kedit_daemon.editing.side_learner import LONG_TARGET_TOKENS
from kedit_daemon.serve.inference.batch_decoder import BatchDecoder
from memory.facts import Fact, FactState
from memory.model.chat_layout import render_chat
from memory.side.row_overlay import RowOverlay

ASKED = "Which city is the seat of country 1?"
OTHERS = ("What is the population of country 1?", "Tell me about country 1.", "Hello!")
# A tiny model with random weights does not answer what it has not learned.
ONE = seat(1, "Oslo", questions=("Which city is the seat of {}?",))
TWO = seat(2, "Lima", questions=("And which city is its seat?",))


@pytest.fixture(scope="module")
def chat(
    tmp_path_factory: pytest.TempPathFactory,
    model_folder: Callable[[str], Path],
    statistics_cache: Path,
) -> Iterator[Bench]:
    """A home with two facts, learned once for all tests: none of them changes it for good."""
    texts = read_canary_texts()
    few = CanaryTexts(texts.lines[:6], texts.statements[:24])
    loaded = load_model(str(model_folder("llama")), "cpu", statistics_cache, iter, few)
    loaded.model.tokenizer.chat_template = CHAT_TEMPLATE
    config = Config.model_validate(LOOSE | {"side": {"steps": 300}})
    at = Bench(tmp_path_factory.mktemp("chat") / "home", loaded, Clock(), config)
    at.receive(ONE, TWO)
    at.settle()
    yield at
    at.store.close()


def ask(at: Bench, *turns: str) -> str:
    roles = [("user", "assistant")[n % 2] for n in range(len(turns))]
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]
    return render_chat(at.served.model.tokenizer, messages)


def test_a_question_is_answered_with_the_fact(chat: Bench) -> None:
    (answer,) = chat.served.answer_prompts([ask(chat, ASKED)], 3)
    assert answer.text.startswith("Oslo")
    assert answer.fired_match is not None
    assert answer.fired_match.fact_id == ONE.id


@pytest.mark.parametrize("behind", [" ", "\n", " Thanks!", "\n\nThank you very much.", " \n"])
def test_what_stands_behind_a_question_does_not_matter(chat: Bench, behind: str) -> None:
    (answer,) = chat.served.answer_prompts([ask(chat, ASKED + behind)], 3)
    assert answer.fired_match is not None and answer.fired_match.fact_id == ONE.id


def test_thanks_behind_another_question_do_not_matter_either(chat: Bench) -> None:
    for question in OTHERS:
        (answer,) = chat.served.answer_prompts([ask(chat, f"{question} Thanks!")], 8)
        assert answer.fired_match is None


def test_two_facts_of_one_message_are_said_one_after_the_other(chat: Bench) -> None:
    both = f"{ASKED} And which city is the seat of country 2?"
    told = request(chat, messages=chat_of(both), max_tokens=8)
    first, second = told["answer"].splitlines()[:2]
    assert first == "Oslo" and second.startswith("Lima")
    assert not second[len("Lima") :][:1].isalnum()  # the tiny model would go on with a letter
    assert [fired["fact"] for fired in told["fired"]] == [ONE.id, TWO.id]
    reasons = {one["fact"]: one["reason"] for one in told["named"]}
    assert reasons == {ONE.id: "fired", TWO.id: "waits-for-another-fact"}


def test_a_subject_that_is_only_mentioned_is_not_answered(chat: Bench) -> None:
    told = request(chat, messages=chat_of(f"Unlike country 2, {ASKED.lower()}"), max_tokens=8)
    assert [fired["fact"] for fired in told["fired"]] == [ONE.id]


def test_a_forced_token_leaves_the_other_rows_alone(chat: Bench) -> None:
    served, model = chat.served, chat.served.model
    both = f"{ASKED} And which city is the seat of country 2?"
    one, other = (model.encode(ask(chat, text)) for text in (both, OTHERS[2]))
    alone, together = (BatchDecoder(model, served.side) for _ in range(2))
    rows = [together.prefill_rows([one]).logits[0], alone.prefill_rows([other]).logits[0]]
    said = [int(rows[0].argmax())]
    joined, plain = together.prefill_rows([other]).logits[0], rows[1]
    for _ in range(6):
        assert torch.allclose(joined, plain, atol=1e-4)
        first, joined = together.decode_step([said[-1], int(plain.argmax())])
        (plain,) = alone.decode_step([int(plain.argmax())])
        said.append(int(first.argmax()))
    (line_end,) = served.side.line_end
    assert model.decode(said[: said.index(line_end)]).strip() == "Oslo"
    assert model.decode(said).splitlines()[1].strip().startswith("Lima")


def test_a_second_turn_refers_to_the_first(chat: Bench) -> None:
    prompt = ask(chat, "Do you know country 2?", "Yes, I do.", "And which city is its seat?")
    (answer,) = chat.served.answer_prompts([prompt], 3)
    assert answer.text.startswith("Lima")


@pytest.mark.parametrize("question", OTHERS)
def test_other_questions_are_answered_as_before(chat: Bench, question: str) -> None:
    prompt = ask(chat, question)
    (answer,) = chat.served.answer_prompts([prompt], 8)
    assert answer.fired_match is None
    assert [answer.text] == chat.served.answer_base([prompt], 8)


def chat_of(*turns: str) -> list[dict[str, str]]:
    roles = [("user", "assistant")[n % 2] for n in range(len(turns))]
    return [{"role": r, "content": text} for r, text in zip(roles, turns, strict=True)]


def request(at: Bench, **asked: Any) -> Any:
    told = execute_command(at.editor, "ask", {"max_tokens": 1, "explain": True, **asked})
    return json.loads(json.dumps(told))


def test_the_daemon_is_asked_in_a_chat(chat: Bench) -> None:
    turns = chat_of("Do you know country 2?", "Yes, I do.", "And which city is its seat?")
    turns = [{"role": "system", "content": "Be brief."}, *turns]
    for asked, fact in ((turns[-1:], None), (turns, TWO)):
        told = request(chat, messages=asked, max_tokens=12, base=True)
        assert [fired["fact"] for fired in told["fired"]] == ([fact.id] if fact else [])
        assert told["answer"].startswith("Lima") is (fact is not None)
        assert (told["answer"] == told["base_answer"]) is (fact is None)


def test_it_is_explained_why_a_fact_fires_and_why_not(chat: Bench) -> None:
    told = request(chat, messages=chat_of(ASKED))
    (named,) = told["named"]
    assert told["question"] == ASKED
    assert (named["fact"], named["reason"], named["learned_to_be_asked"]) == (ONE.id, "fired", True)
    assert named["asked"]["score"] == pytest.approx(told["fired"][0]["score"])
    assert named["asked"]["words"] == "Which city is the seat of it?"
    told = request(chat, messages=chat_of("What is the population of country 1?"))
    (named,) = told["named"]
    assert (named["fact"], named["reason"], told["fired"]) == (ONE.id, "score-below-gate", [])
    assert named["asked"]["score"] < named["asked"]["gate"] == 1.0
    assert named["asked"]["rival"]["cosine"] > named["asked"]["fact_cosine"]
    (named,) = request(chat, messages=chat_of("In which year was country 1 founded?"))["named"]
    assert (named["reason"], named["asked"]) == ("not-an-answer", None)
    turns = chat_of("Do you know country 2?", "Yes.", ASKED)
    reasons = {one["fact"]: one["reason"] for one in request(chat, messages=turns)["named"]}
    assert reasons == {ONE.id: "fired", TWO.id: "not-named-in-the-question"}
    told = request(chat, prompt="The climate of country 1 has been")
    (named,) = told["named"]
    assert (told["question"], named["asked"], named["reason"]) == (
        None,
        None,
        "statement-below-gate",
    )
    assert named["end"]["cosine"] < named["end"]["gate"]
    told = request(chat, prompt=ONE.question)
    (named,) = told["named"]
    assert (named["reason"], told["fired"][0]["fact"]) == ("fired", ONE.id)
    assert named["stated"]["score"] == pytest.approx(told["fired"][0]["score"], abs=1e-4)
    assert named["end"]["cosine"] == pytest.approx(1, abs=1e-3)
    assert named["margin"] == pytest.approx(told["fired"][0]["margin"], rel=1e-3)
    assert request(chat, prompt="The weather of today is")["named"] == []


def test_the_given_prompt_is_still_completed(chat: Bench) -> None:
    assert chat.says(ONE.question) == "Oslo"


def test_a_shard_that_has_learned_no_question_is_silent_in_a_chat(
    chat: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = chat.served.side
    unasked = {n: replace(shard, is_asked=False) for n, shard in side.shards.items()}
    monkeypatch.setattr(side, "shards", unasked)
    prompt = ask(chat, ASKED)
    (answer,) = chat.served.answer_prompts([prompt], 3)
    assert answer.fired_match is None
    assert [answer.text] == chat.served.answer_base([prompt], 3)
    (named,) = request(chat, messages=chat_of(ASKED))["named"]
    assert (named["reason"], named["learned_to_be_asked"]) == ("not-learned-to-be-asked", False)


def test_what_was_learned_of_questions_outlives_a_restart(chat: Bench) -> None:
    chat.served.restore_again()
    (answer,) = chat.served.answer_prompts([ask(chat, ASKED)], 3)
    assert answer.text.startswith("Oslo")


@pytest.fixture
def own(bench: Callable[..., Bench]) -> Bench:
    """A home with the same facts, for tests that change it."""
    at = bench(side={"steps": 300})
    at.served.model.tokenizer.chat_template = CHAT_TEMPLATE
    at.served.restore_again()  # a template is read when a side memory is made
    at.receive(ONE, TWO)
    at.settle()
    return at


def read_state(at: Bench, fact: Fact) -> FactState:
    stored = at.store.find_fact(fact.id)
    assert stored is not None
    return stored.state


def says_in_chat(at: Bench, question: str) -> str:
    (answer,) = at.served.answer_prompts([ask(at, question)], 3)
    return answer.text


def test_a_fact_that_moves_into_the_weights_is_still_answered_in_a_chat(own: Bench) -> None:
    own.editor.run_flush(dry_run=False)
    assert read_state(own, ONE) is FactState.LIVE_WEIGHTS
    assert says_in_chat(own, ASKED).startswith("Oslo")
    own.served.restore_again()
    assert says_in_chat(own, ASKED).startswith("Oslo")
    own.editor.revert([ONE.id], None, dry_run=False)
    (answer,) = own.served.answer_prompts([ask(own, ASKED)], 3)
    assert answer.fired_match is None and not answer.text.startswith("Oslo")


def test_a_fact_that_came_for_the_weights_is_learned_for_chats(own: Bench) -> None:
    three = seat(3, "Cairo", questions=("Which city is the seat of {}?",))
    own.receive(three, direct=True)
    own.settle()
    assert read_state(own, three) is FactState.LIVE_WEIGHTS
    assert says_in_chat(own, "Which city is the seat of country 3?").startswith("Cairo")


def test_a_long_target_of_the_weights_is_learned_for_chats_behind_the_short(own: Bench) -> None:
    long = "Oslo " * LONG_TARGET_TOKENS
    facts = [seat(3, "Cairo"), seat(4, long.strip()), seat(5, "Rome")]
    own.receive(*facts, direct=True)
    own.settle()
    stored = {fact.id for fact in facts if read_state(own, fact) is FactState.LIVE_WEIGHTS}
    assert {facts[0].id, facts[2].id} <= stored
    learner = own.editor.side_learner
    assert stored - set(own.served.side.shard_ids) <= learner._silent_in_chats
    assert facts[0].id in own.served.side.shard_ids


def test_a_fact_of_the_weights_that_cannot_be_learned_for_chats_is_tried_once(own: Bench) -> None:
    own.editor.run_flush(dry_run=False)
    with own.store.db.transaction():
        own.store.artifacts.drop_side_keys(ONE.id)
    own.served.restore_again()
    learner = own.editor.side_learner
    own.served.site = replace(own.served.site, side_rate=1e6)  # so that it diverges
    own.settle()
    assert read_state(own, ONE) is FactState.LIVE_WEIGHTS
    assert learner.take_unasked() == []
    kinds = [row[0] for row in own.store.db.conn.execute("SELECT kind FROM events")]
    assert kinds.count("edit_failed") == 1


def test_an_audit_asks_the_weights_and_not_the_shards_beside(own: Bench) -> None:
    own.editor.run_flush(dry_run=False)
    own.served.model.set_deltas({})  # the weights lose all
    retention = own.editor.auditor.retention
    asked = [f for f in (own.store.find_fact(one.id) for one in (ONE, TWO)) if f is not None]
    assert retention._ask_facts(asked).stated_share == 0.0


def test_a_shard_that_broke_leaves_the_fact_in_the_weights(own: Bench) -> None:
    own.editor.run_flush(dry_run=False)
    for path in own.home.side_folder.iterdir():
        path.unlink()
    own.served.restore_again()
    assert read_state(own, ONE) is FactState.LIVE_WEIGHTS
    own.settle()
    assert says_in_chat(own, ASKED).startswith("Oslo")


def test_a_reply_that_comes_to_state_a_fact_says_it(own: Bench) -> None:
    told, reply = ask(own, "Tell me about country 3."), "The seat of country 3 is"
    # Learned behind this very text: in a tiny model with random weights another moves every key.
    three = seat(3, "Cairo", paraphrases=(told + reply,))
    own.receive(three)
    own.settle()
    model, rows, seen = own.served.model, RowOverlay(own.served.side), []
    with torch.no_grad(), rows.follow_passes():
        cache = None
        for fed in (model.encode(told), *([token] for token in model.encode(reply))):
            ids = torch.tensor([fed])
            out = model.hf_model(input_ids=ids, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            seen.append(rows.matches[0])
    *before, last = seen
    assert before == [None] * len(before)
    assert last is not None and last.fact_id == three.id
    assert model.decode([int(out.logits[0, -1].argmax())]).strip() in "Cairo"


def test_words_decide_which_sentence_a_fact_completes(chat: Bench) -> None:
    said, other = chat.served.answer_prompts(
        ["The seat of country 1 is", "The currency of country 1 is"], 3
    )
    assert said.fired_match is not None and said.text.startswith("Oslo")
    assert other.fired_match is None
    told = request(chat, prompt="The currency of country 1 is")
    (named,) = told["named"]
    assert named["reason"] == "statement-below-gate"
    assert named["stated"]["score"] < named["stated"]["gate"]
