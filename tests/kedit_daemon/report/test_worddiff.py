from hypothesis import given
from hypothesis import strategies as st

from kedit_daemon.report.worddiff import NEW, OLD, SAME, diff_words

answers = st.text("ab ", max_size=20)


def test_words_that_stay_are_told_once() -> None:
    assert list(diff_words("in the south of Sweden", "in the north of Norway now")) == [
        (SAME, "in the"),
        (OLD, "south"),
        (NEW, "north"),
        (SAME, "of"),
        (OLD, "Sweden"),
        (NEW, "Norway now"),
    ]
    assert list(diff_words("Egypt", "Egypt")) == [(SAME, "Egypt")]


@given(answers, answers)
def test_both_answers_can_be_read_from_it(before: str, after: str) -> None:
    changes = list(diff_words(before, after))
    assert " ".join(text for sort, text in changes if sort != NEW) == before
    assert " ".join(text for sort, text in changes if sort != OLD) == after
