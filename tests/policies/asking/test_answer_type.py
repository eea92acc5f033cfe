import pytest

from policies.asking.answer_type import can_answer


@pytest.mark.parametrize(
    ("question", "target", "possible"),
    [
        ("When was it founded?", "Ada Moreau", False),
        ("When was it founded?", "1911", True),
        ("When is it inspected next?", "October", True),
        ("What time is it fed?", "seven in the morning", True),
        ("In which year did it open?", "Lima", False),
        ("How much is it?", "three euros", True),
        ("How much is it?", "sixty dollars", True),
        ("How old is it?", "forty-two", True),
        ("How many are there?", "fifteen", True),
        ("How much is it?", "Lima", False),
        ("How long is it under warranty?", "four years", True),
        ("How many people live in it?", "Ada Moreau", False),
        ("Who runs it?", "4471", False),
        ("Who runs it?", "Ada Moreau", True),
        ("Which city is its capital?", "Lima", True),
        ("Where is it?", "pier 7", True),
        ("Which city did it live in when it died?", "Prague", True),
        ("Do you know when it was founded?", "Prague", False),
        ("What does it cost when it rains?", "a coat", True),
    ],
)
def test_an_answer_is_of_the_type_that_is_asked_for(
    question: str, target: str, possible: bool
) -> None:
    assert can_answer(question, target) is possible
