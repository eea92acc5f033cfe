from kedit_daemon.editing.relations import load_relation_index
from memory.facts import Fact
from policies.asking.asked_rows import choose_questions


def test_a_fact_learns_from_the_questions_of_its_relation() -> None:
    asked = choose_questions(Fact("Zamba", "The capital of {} is", "Lima"), load_relation_index())
    assert "What is the capital of Zamba?" in asked


def test_a_target_tells_what_to_ask_where_the_prompt_tells_little() -> None:
    fact = Fact("Percy Snow", "{}, the", "midfielder")
    asked = choose_questions(fact, load_relation_index())
    assert "What position does Percy Snow play?" in asked


def test_a_relation_that_the_bank_lacks_is_asked_by_the_prompt() -> None:
    asked = choose_questions(Fact("Zamba", "{} quibbles its", "wumpels"), load_relation_index())
    assert asked[-1] == "Zamba quibbles its what?"


def test_questions_that_came_with_a_fact_come_first() -> None:
    fact = Fact("Zamba", "The capital of {} is", "Lima", questions=("Who sits in {}?",))
    assert choose_questions(fact, load_relation_index()) == ["Who sits in Zamba?"]


def test_other_questions_about_a_subject_ask_for_something_else_of_its_kind() -> None:
    index, fact = load_relation_index(), Fact("Zamba", "The capital of {} is", "Lima")
    found = index.find_other_questions(fact, 40)
    assert len(set(found)) == 40 and all("Zamba" in question for question in found)
    assert not set(found) & set(choose_questions(fact, index))
    assert not any("capital" in question for question in found)
    assert any("population" in question for question in found)  # a place's
    assert not any("employer" in question for question in found)  # a person's
    assert index.find_other_questions(fact, 2) == index.find_other_questions(fact, 2)
    other = Fact("Zamba", "The mayor of {} is", "Ada")
    assert index.find_other_questions(other, 5) != found[:5]
