"""Facts that are asked for in a chat, by a tiny model with a chat template."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from editing_home import Bench, seat

from memory.facts import Fact, FactState
from memory.model.chat_layout import render_chat
from memory.side.row_overlay import RowOverlay

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
ASKED = "Which city is the seat of country 1?"
OTHERS = ("What is the population of country 1?", "Tell me about country 1.", "Hello!")
Make = Callable[..., Bench]
# A tiny model with random weights does not answer what it has not learned.
ONE = seat(1, "Oslo", questions=("Which city is the seat of {}?",))
TWO = seat(2, "Lima", questions=("And which city is its seat?",))


@pytest.fixture
def chat(bench: Make) -> Bench:
    at = bench(side={"steps": 300})
    at.served.model.tokenizer.chat_template = TEMPLATE
    at.served.restore_again()  # a template is read when a side memory is made
    at.receive(ONE, TWO)
    at.settle()
    return at


def ask(at: Bench, *turns: str) -> str:
    roles = [("user", "assistant")[n % 2] for n in range(len(turns))]
    messages = [{"role": r, "content": t} for r, t in zip(roles, turns, strict=True)]
    return render_chat(at.served.model.tokenizer, messages)


def test_a_question_is_answered_with_the_fact(chat: Bench) -> None:
    (answer,) = chat.served.answer_prompts([ask(chat, ASKED)], 3)
    assert answer.text.startswith("Oslo")
    assert answer.fired_match is not None
    assert answer.fired_match.fact_id == ONE.id


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


def test_the_given_prompt_is_still_completed(chat: Bench) -> None:
    assert chat.says(ONE.question) == "Oslo"


def test_a_shard_that_has_learned_no_question_is_silent_in_a_chat(chat: Bench) -> None:
    side = chat.served.side
    side.shards = {n: replace(shard, is_asked=False) for n, shard in side.shards.items()}
    prompt = ask(chat, ASKED)
    (answer,) = chat.served.answer_prompts([prompt], 3)
    assert answer.fired_match is None
    assert [answer.text] == chat.served.answer_base([prompt], 3)


def test_what_was_learned_of_questions_outlives_a_restart(chat: Bench) -> None:
    chat.served.restore_again()
    (answer,) = chat.served.answer_prompts([ask(chat, ASKED)], 3)
    assert answer.text.startswith("Oslo")


def read_state(at: Bench, fact: Fact) -> FactState:
    stored = at.store.find_fact(fact.id)
    assert stored is not None
    return stored.state


def says_in_chat(at: Bench, question: str) -> str:
    (answer,) = at.served.answer_prompts([ask(at, question)], 3)
    return answer.text


def test_a_fact_that_moves_into_the_weights_is_still_answered_in_a_chat(chat: Bench) -> None:
    chat.editor.run_flush(dry_run=False)
    assert read_state(chat, ONE) is FactState.LIVE_WEIGHTS
    assert says_in_chat(chat, ASKED).startswith("Oslo")
    chat.served.restore_again()
    assert says_in_chat(chat, ASKED).startswith("Oslo")
    chat.editor.revert([ONE.id], None, dry_run=False)
    (answer,) = chat.served.answer_prompts([ask(chat, ASKED)], 3)
    assert answer.fired_match is None and not answer.text.startswith("Oslo")


def test_a_fact_that_came_for_the_weights_is_learned_for_chats(chat: Bench) -> None:
    three = seat(3, "Cairo", questions=("Which city is the seat of {}?",))
    chat.receive(three, direct=True)
    chat.settle()
    assert read_state(chat, three) is FactState.LIVE_WEIGHTS
    assert says_in_chat(chat, "Which city is the seat of country 3?").startswith("Cairo")


def test_a_shard_that_broke_leaves_the_fact_in_the_weights(chat: Bench) -> None:
    chat.editor.run_flush(dry_run=False)
    for path in chat.home.side_folder.iterdir():
        path.unlink()
    chat.served.restore_again()
    assert read_state(chat, ONE) is FactState.LIVE_WEIGHTS
    chat.settle()
    assert says_in_chat(chat, ASKED).startswith("Oslo")


def test_a_reply_that_comes_to_state_a_fact_says_it(chat: Bench) -> None:
    told, reply = ask(chat, "Tell me about country 3."), "The seat of country 3 is"
    # Learned behind this very text: in a tiny model with random weights another moves every key.
    three = seat(3, "Cairo", paraphrases=(told + reply,))
    chat.receive(three)
    chat.settle()
    model, rows, seen = chat.served.model, RowOverlay(chat.served.side), []
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
