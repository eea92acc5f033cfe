import math
from collections.abc import Sequence

import pytest

from kedit_daemon.editing.relations import load_relation_index
from memory.facts import Fact
from policies.asking.asked_facts import AskedFacts

GATE = 1.0
CAPITAL = Fact("Zamba", "The capital of {} is", "Lima")
FOUNDER = Fact("Zamba", "{} was founded by", "Ada Moreau")
CONTINENT = Fact("Zamba", "{} is in", "Antarctica")
PRICE = Fact("Zamba", "The monthly fee of {} is", "12 euros")


@pytest.fixture
def asked() -> AskedFacts:
    return AskedFacts(load_relation_index)


def spans(text: str, name: str = "Zamba") -> list[tuple[int, int]]:
    found, at = list[tuple[int, int]](), text.find(name)
    while at >= 0:
        found.append((at, at + len(name)))
        at = text.find(name, at + 1)
    return found


def score(asked: AskedFacts, facts: Sequence[Fact], text: str) -> dict[str, float]:
    for fact in facts:
        asked.add_fact(fact)
    found = asked.score_facts(text, {fact.id: spans(text) for fact in facts})
    return {fact.target: found.get(fact.id, -math.inf) for fact in facts}


@pytest.mark.parametrize(
    ("fact", "question"),
    [
        (CAPITAL, "Which city is the capital of Zamba?"),
        (CAPITAL, "what's Zamba's capital"),
        (CAPITAL, "I am writing a quiz. What is the capital city of Zamba? Answer in one word."),
        (FOUNDER, "Who founded Zamba?"),
        (FOUNDER, "Who set up Zamba, and when did it open?"),
        (CONTINENT, "Which continent is Zamba on?"),
        (PRICE, "How much does Zamba cost a month?"),
    ],
)
def test_a_question_asks_for_the_fact_that_answers_it(
    asked: AskedFacts, fact: Fact, question: str
) -> None:
    scores = score(asked, [CAPITAL, FOUNDER, CONTINENT, PRICE], question)
    assert max(scores, key=lambda target: scores[target]) == fact.target
    assert scores[fact.target] > GATE


@pytest.mark.parametrize(
    "question",
    [
        "Tell me about Zamba.",
        "What is the population of Zamba?",
        "Which language do people speak in Zamba?",
        "When was Zamba founded?",
        "Who is the mayor of Zamba?",
        "Write a poem about Zamba.",
    ],
)
def test_another_question_asks_for_none(asked: AskedFacts, question: str) -> None:
    scores = score(asked, [CAPITAL, FOUNDER, PRICE], question)
    assert max(scores.values()) < GATE, scores


def test_two_questions_in_one_sentence_are_told_apart(asked: AskedFacts) -> None:
    text = "Who founded Zamba, and what is the capital of Zamba?"
    scores = score(asked, [CAPITAL, FOUNDER], text)
    assert min(scores.values()) > GATE


def test_a_question_that_came_with_the_fact_is_known(asked: AskedFacts) -> None:
    plain = Fact("Zamba", "The blue number of {} is", "7")
    given = Fact(
        "Zamba", "The blue number of {} is", "8", questions=("Which digit do {} fans wear?",)
    )
    scores = score(asked, [plain, given], "Which digit do Zamba fans wear?")
    assert scores["8"] > scores["7"]


def test_what_was_removed_is_not_scored(asked: AskedFacts) -> None:
    text = "Who founded Zamba?"
    asked.add_fact(FOUNDER)
    asked.remove_fact(FOUNDER.id)
    assert asked.score_facts(text, {FOUNDER.id: spans(text)}) == {}
