from hypothesis import given
from hypothesis import strategies as st

from kedit_daemon.report.worddiff import NEW, OLD, SAME, word_changes

answers = st.text("ab ", max_size=20)


def test_words_that_stay_are_told_once() -> None:
    assert list(word_changes("in the south of Sweden", "in the north of Norway now")) == [
        (SAME, "in the"),
        (OLD, "south"),
        (NEW, "north"),
        (SAME, "of"),
        (OLD, "Sweden"),
        (NEW, "Norway now"),
    ]
    assert list(word_changes("Egypt", "Egypt")) == [(SAME, "Egypt")]


@given(answers, answers)
def test_both_answers_can_be_read_from_it(before: str, after: str) -> None:
    changes = list(word_changes(before, after))
    assert " ".join(text for sort, text in changes if sort != NEW) == before
    assert " ".join(text for sort, text in changes if sort != OLD) == after
