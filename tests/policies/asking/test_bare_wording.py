import pytest

from policies.asking.bare_wording import reduce_question, reduce_statement


@pytest.mark.parametrize(
    ("statement", "question"),
    [
        ("it is in", "Which country is it in?"),
        ("it, in", "In which country is it?"),
        ("it is within", "Where is it located?"),
        ("it is located in", "Which place is it located?"),
        ("it can be found in", "where can you find it"),
        ("it, by", "Which company is it by?"),
        ("it is from", "What is it from?"),
        ("it, from", "Where is it from?"),
        ("it, the", "Who is it?"),
        ("it is a", "what's it"),
        ("it is in", "And which city is it in?"),
    ],
)
def test_a_question_that_tells_no_more_than_a_prompt_reduces_to_it(
    statement: str, question: str
) -> None:
    assert reduce_statement(statement) == reduce_question(question) is not None


@pytest.mark.parametrize(
    ("statement", "question"),
    [
        ("it is in", "Which company is it by?"),
        ("it is in", "Who is it?"),
        ("it, the", "Where is it?"),
        ("it, of", "What is of it?"),
    ],
)
def test_other_prepositions_and_another_order_ask_for_something_else(
    statement: str, question: str
) -> None:
    assert reduce_statement(statement) != reduce_question(question)


@pytest.mark.parametrize(
    "question",
    [
        "Who founded it?",
        "Which company owns it?",
        "When is it?",
        "How is it in?",
        "Is it in?",
        "In which year was it founded?",
        "Which of the two largest of them is it in?",
        "Which language is it in?",
        "In which film was it?",
        "What religion is it?",
        "What currency does it have?",
        "Whose son is it?",
        "Where was it found?",
        "Which country?",
        "",
    ],
)
def test_a_question_with_a_word_of_its_own_is_not_reduced(question: str) -> None:
    assert reduce_question(question) is None


@pytest.mark.parametrize(
    "statement",
    [
        "it owns",
        "The capital of it is",
        "its owner is",
        "is in",
        "it",
        "It. It",
        "it has",
        "it is",
        "",
    ],
)
def test_a_statement_with_a_word_of_its_own_is_not_reduced(statement: str) -> None:
    assert reduce_statement(statement) is None
