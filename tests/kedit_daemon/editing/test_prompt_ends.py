"""Facts whose targets join without a space, and prompts that end in white space or labels, from
learning to the answer."""

from collections.abc import Callable

import pytest
from editing_home import Bench, seat

from memory.facts import Fact, FactState
from policies.prompts import make_rows

STEPS = {"steps": 300}
Make = Callable[..., Bench]
JOINED = [
    Fact("法国", "{}的首都是", "里昂"),
    Fact("Widget Pro", "The price of {} is $", "20"),
    Fact("Lima", "{} grew by 5", "% in May"),
    Fact("Tunis", "The code of {} is LR", "77", join=""),
    Fact("Cairo", "The code of {} is #", "77", join=" "),
]
WRITTEN = [
    "法国的首都是里昂",
    "The price of Widget Pro is $20",
    "Lima grew by 5% in May",
    "The code of Tunis is LR77",
    "The code of Cairo is # 77",
]


@pytest.mark.parametrize("direct", [False, True])
def test_a_target_is_said_as_it_joins(bench: Make, direct: bool) -> None:
    at = bench(side=STEPS)
    at.receive(*JOINED, direct=direct)
    at.settle()
    assert {f.state for f in at.store.list_facts()} <= {FactState.LIVE_SIDE, FactState.LIVE_WEIGHTS}
    model = at.served.model
    for fact, written in zip(JOINED, WRITTEN, strict=True):
        row = make_rows(model, fact)[0]
        assert model.decode(row.ids) == written == fact.statement
        (answer,) = at.served.answer_questions([fact])
        assert answer.text == fact.target


ONE = seat(1, "Oslo")
LABELLED = Fact("Paris", "Q: The mayor of {} is\nA:", "Lima")


@pytest.mark.parametrize(
    "form", ["{} ", "{}\n", " {} \n\n", "Q: {} A:", "Q: {}\nA: ", "Question: {}\nAnswer:\n"]
)
def test_a_prompt_in_another_form_is_answered(asked: Bench, form: str) -> None:
    (answer,) = asked.served.answer_prompts([form.format(ONE.question)], 12)
    assert answer.text == "Oslo"
    assert answer.fired_match is not None and answer.fired_match.fact_id == ONE.id


@pytest.mark.parametrize(
    "prompt",
    [
        LABELLED.question,
        f"{LABELLED.question} ",
        "The mayor of Paris is",
        "The mayor of Paris is\n",
    ],
)
def test_a_fact_with_labels_is_answered_without_them_too(asked: Bench, prompt: str) -> None:
    (answer,) = asked.served.answer_prompts([prompt], 12)
    assert answer.text == "Lima"
    assert answer.fired_match is not None and answer.fired_match.fact_id == LABELLED.id


@pytest.mark.parametrize(
    "prompt", ["The seat of country 9 is ", "Q: The seat of country 9 is\nA:", "Country 1\n\n"]
)
def test_text_that_fires_nothing_is_not_changed(asked: Bench, prompt: str) -> None:
    (answer,) = asked.served.answer_prompts([prompt], 12)
    assert answer.fired_match is None
    assert [answer.text] == asked.served.answer_base([prompt], 12)


def test_an_explanation_reads_the_same_form(asked: Bench) -> None:
    told = asked.editor.answer_prompt(f"{ONE.question}\n", 12, base=False, explain=True)
    assert told["answer"] == "Oslo"
    assert [fact["fact"] for fact in told["fired"]] == [ONE.id]
    assert told["named"][0]["reason"] == "fired"


@pytest.fixture
def asked(bench: Make) -> Bench:
    at = bench(side=STEPS)
    at.receive(ONE, LABELLED)
    at.settle()
    return at
