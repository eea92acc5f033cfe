from kedit_daemon.editing.relations import load_relation_index
from memory.facts import Fact
from policies.asking.asked_rows import choose_questions
from policies.asking.chat_probe import (
    ChatProbe,
    FailedQuestion,
    Relearning,
    choose_probe_questions,
    list_learnable,
)

CAPITAL = Fact("France", "The capital of {} is", "Lyon")


def test_a_fact_is_asked_what_it_has_learned_and_what_it_has_not() -> None:
    index = load_relation_index()
    learned = choose_questions(CAPITAL, index)
    known, other = choose_probe_questions(CAPITAL, index)
    assert known == "What is the capital of France?" == learned[0]
    assert other not in learned and "capital" in other and "France" in other


def test_all_questions_that_came_with_a_fact_are_asked() -> None:
    asked = ("Where is the government of {}?", "{}: its first city?", "And its capital?")
    fact = Fact("France", "The capital of {} is", "Lyon", questions=asked)
    *given, other = choose_probe_questions(fact, load_relation_index())
    # The last names nobody, and would follow on nothing.
    assert given == ["Where is the government of France?", "France: its first city?"]
    assert other == "What is the capital of France?"


def test_a_question_of_another_relation_tells_nothing_about_a_fact() -> None:
    fact = Fact("country 1", "The seat of {} is", "Oslo")
    learned = choose_questions(fact, load_relation_index())
    assert learned[0] == "How many seats are there in country 1?"  # the bank has no nearer one
    chosen = choose_probe_questions(fact, load_relation_index())
    assert chosen == ["What is the seat of country 1?"]


def test_what_does_not_fire_is_not_learned_again() -> None:
    fired, silent = FailedQuestion("Who?", "Ann", True), FailedQuestion("When?", "Ann", False)
    assert list_learnable([fired, silent], is_asked=True) == ["Who?"]
    assert list_learnable([silent], is_asked=True) == []
    assert list_learnable([silent], is_asked=False) == ["When?"]


def test_a_probe_is_read_as_it_was_written() -> None:
    failed = (FailedQuestion("Who?", "Ann", True),)
    for probe in (ChatProbe("ab", 2), ChatProbe("ab", 2, failed, Relearning.WAITS)):
        values = probe.as_dict()
        assert values["answered"] == 2 - len(probe.failed)
        assert ChatProbe.from_dict(values) == probe
