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
    return {f.target: found[f.id].score if f.id in found else -math.inf for f in facts}


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


def test_a_relations_own_question_asks_for_its_facts(asked: AskedFacts) -> None:
    chief = Fact("Zamba", "The chief executive of {} is", "Ada Moreau")
    assert score(asked, [chief], "Who runs Zamba?")["Ada Moreau"] > GATE
    assert score(asked, [chief], "Who founded Zamba?")["Ada Moreau"] < GATE


@pytest.mark.parametrize(
    "text",
    ["Who founded Zamba? And who founded Quilla?", "Who founded Zamba, and who founded Quilla?"],
)
def test_each_of_two_facts_is_asked_for_in_its_own_clause(asked: AskedFacts, text: str) -> None:
    other = Fact("Quilla", "The founder of {} is", "Bo Lind")
    asked.add_fact(FOUNDER)
    asked.add_fact(other)
    found = asked.score_facts(text, {FOUNDER.id: spans(text), other.id: spans(text, other.subject)})
    first, second = found[FOUNDER.id], found[other.id]
    assert min(first.clause_score, second.clause_score) > GATE
    assert "Zamba" in text[slice(*first.clause)] and "Quilla" in text[slice(*second.clause)]
    assert first.clause[1] <= second.clause[0]


@pytest.mark.parametrize(
    "text",
    [
        "Unlike Quilla, what is the capital of Zamba?",
        "I visited Quilla, but what is the capital of Zamba?",
        "What is the capital of Zamba, not Quilla?",
        "What is the capital of Zamba, which borders Quilla?",
    ],
)
def test_a_clause_that_only_mentions_a_subject_asks_for_nothing_by_itself(
    asked: AskedFacts, text: str
) -> None:
    other = Fact("Quilla", "The capital of {} is", "Oslo")
    asked.add_fact(CAPITAL)
    asked.add_fact(other)
    named = {CAPITAL.id: spans(text), other.id: spans(text, other.subject)}
    found = asked.score_facts(text, named)
    assert found[CAPITAL.id].score > found[other.id].score
    assert found[CAPITAL.id].score > GATE > found[other.id].clause_score


BORN = Fact("Ada Moreau", "{} was born in", "Lima")


def state(asked: AskedFacts, fact: Fact, text: str) -> float:
    asked.add_fact(fact)
    return asked.score_statements(text, {fact.id: spans(text, fact.subject)})[fact.id]


@pytest.mark.parametrize(
    "text",
    [
        "Ada Moreau was born in",
        "It rained. Ada Moreau was born in",
        "The birthplace of Ada Moreau is",
        "She was a poet.\nAda Moreau, born in the town of",
        "The town in which Ada Moreau was born is",
    ],
)
def test_a_sentence_that_comes_to_state_a_fact(asked: AskedFacts, text: str) -> None:
    assert state(asked, BORN, text) > GATE


@pytest.mark.parametrize(
    "text",
    [
        "Ada Moreau died in",
        "Ada Moreau was employed by",
        "The mother tongue of Ada Moreau is",
        "Ada Moreau was born in Lima. The husband of Ada Moreau was",
    ],
)
def test_a_sentence_about_something_else_states_it_not(asked: AskedFacts, text: str) -> None:
    assert state(asked, BORN, text) < GATE


def test_a_sentence_about_another_subject_states_nothing_of_this_one(asked: AskedFacts) -> None:
    text = "Ada Moreau met Bo Lind. Bo Lind was born in"
    asked.add_fact(BORN)
    assert asked.score_statements(text, {BORN.id: spans(text, "Ada Moreau")}) == {}
    assert state(asked, BORN, "Ada Moreau met Bo Lind. She was born in") > GATE


def test_a_prompt_that_names_the_subject_by_an_alias(asked: AskedFacts) -> None:
    fact = Fact("New York City", "NYC is the home of the", "Mets", aliases=("NYC",))
    asked.add_fact(fact)
    text = "NYC is the home of the"
    assert asked.score_statements(text, {fact.id: spans(text, "NYC")})[fact.id] > GATE


def test_a_prompt_of_several_sentences_is_one(asked: AskedFacts) -> None:
    fact = Fact("Zamba", "Where is {}? It is located in", "Antarctica")
    assert state(asked, fact, "Well. Where is Zamba? It is located in") > GATE


def test_a_fact_of_no_known_relation_is_told_by_its_own_words(asked: AskedFacts) -> None:
    fact = Fact("error E-417", "{} means that the fan is", "blocked")
    assert state(asked, fact, "error E-417 means that the fan is") > GATE
    assert state(asked, fact, "error E-417 was first seen in") < GATE


def test_other_statements_of_its_relation_name_the_subject(asked: AskedFacts) -> None:
    found = asked.index.find_statements(BORN, 2)
    assert len(found) == 2
    assert all("{}" in prompt and prompt != BORN.prompt for prompt in found)
    assert all("born" in p or "birth" in p or "native" in p for p in found)
    assert asked.index.find_statements(Fact("X", "{} means that the fan is", "y"), 2) == []


@pytest.mark.parametrize(
    ("prompt", "target", "question", "other"),
    [
        ("{}, the", "midfielder", "Which position did Zamba play?", "Who was Zamba married to?"),
        ("{} is within", "Texas", "Where does Zamba lie?", "When was Zamba built?"),
    ],
)
def test_a_target_tells_the_relation_where_the_prompt_tells_little(
    asked: AskedFacts, prompt: str, target: str, question: str, other: str
) -> None:
    fact = Fact("Zamba", prompt, target)
    assert score(asked, [fact], question)[target] > GATE
    assert score(asked, [fact], other)[target] < GATE
    silent = Fact("Zamba", prompt, "Ojbrek")
    assert score(asked, [silent], question)["Ojbrek"] < GATE


@pytest.mark.parametrize("prompt", ["{}, in", "{} is within", "{} can be found in"])
def test_words_that_tell_no_relation_ask_for_a_fact_whose_prompt_tells_none(
    asked: AskedFacts, prompt: str
) -> None:
    fact = Fact("Zamba", prompt, "Idaho")
    for question in ("Which county is Zamba in?", "Where is Zamba located?"):
        assert score(asked, [fact], question)["Idaho"] > GATE
    stated = asked.score_statements("Zamba is located in", {fact.id: [(0, 5)]})
    assert stated[fact.id] > GATE
    parts = asked.explain_score("Which county is Zamba in?", fact.id, [(16, 21)])
    assert parts is not None and parts.is_bare and parts.score > GATE
    assert score(asked, [fact], "Which mountain is Zamba named after?")["Idaho"] < GATE
    assert score(asked, [fact], "When is Zamba in?")["Idaho"] == -math.inf


def test_of_two_facts_with_such_prompts_the_nearer_one_is_asked_for(asked: AskedFacts) -> None:
    inside, country = CONTINENT, Fact("Zamba", "{}, in", "Italy")
    scores = score(asked, [inside, country], "Which continent is Zamba in?")
    assert scores["Antarctica"] > scores["Italy"] > GATE


def test_a_sentence_that_tells_no_relation_states_what_the_bank_states_so(
    asked: AskedFacts,
) -> None:
    fact = Fact("Zamba", "{} belongs to the continent of", "Asia")
    assert score(asked, [fact], "Which country is Zamba in?")["Asia"] < GATE
    for text, states in (("Zamba is in", True), ("Zamba is by", False)):
        found = asked.score_statements(text, {fact.id: [(0, 5)]})[fact.id]
        assert (found > GATE) is states


def test_a_fact_that_is_asked_for_comes_before_one_whose_prompt_tells_nothing(
    asked: AskedFacts,
) -> None:
    told = Fact("Zamba", "The country that {} is located in is", "Italy")
    scores = score(asked, [told, Fact("Zamba", "{}, in", "Europe")], "Which country is Zamba in?")
    assert scores["Italy"] > scores["Europe"] > GATE
    stated = asked.score_statements(
        "The country that Zamba is located in is", {told.id: [(17, 22)]}
    )
    assert stated[told.id] > scores["Europe"]


@pytest.mark.parametrize(
    "question",
    [
        "Where was Zamba or Handel born?",
        "Where is Zamba, the 16th president, buried?",
        "Who was Zamba, the composer, taught by?",
        "Where is Zamba and who owns it?",
    ],
)
def test_a_clause_cut_out_of_a_question_tells_more_than_it_says(
    asked: AskedFacts, question: str
) -> None:
    facts = [Fact("Zamba", "{} is in", "Idaho"), Fact("Zamba", "{}, the", "painter")]
    for fact in facts:
        asked.add_fact(fact)
        parts = asked.explain_score(question, fact.id, spans(question))
        assert parts is None or not parts.is_bare
