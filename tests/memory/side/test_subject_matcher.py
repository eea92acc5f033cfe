import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from memory.side.subject_matcher import Names, names, plain


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("Who leads Denmark?", "Denmark"),
        ("DENMARK is led by", "Denmark"),
        ("Denmark's leader is", "Denmark"),
        ("The mayor of St. John's is", "St. John's"),
        ("the mayor of st john s is", "St. John's"),
        ("Jay-Z was born", "Jay Z"),
        ("the  United\nKingdom's leader", "United Kingdom"),
        ("München liegt", "MÜNCHEN"),
        ("Mu\u0308nchen liegt", "München"),
        ("巴黎的市长是", "巴黎"),
        ("Windows 98 is", "Windows 98"),
        ("Denmarks, then Denmark", "Denmark"),
    ],
)
def test_a_subject_is_named_whatever_its_case_and_punctuation(text: str, subject: str) -> None:
    assert names(plain(text), plain(subject))


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("Who leads Sweden?", "Denmark"),
        ("Davidson sings", "David"),
        ("Harald Davids", "David"),
        ("Windows 98 is", "Windows 9"),
        ("Windows 198 is", "Windows 98"),
        ("Kingdom, United", "United Kingdom"),
        ("anything", "!?"),
        ("", "Denmark"),
        ("Den", "Denmark"),
    ],
)
def test_another_subject_is_not_named(text: str, subject: str) -> None:
    assert not names(plain(text), plain(subject))


def test_a_text_names_all_facts_on_its_subjects() -> None:
    known = Names()
    for fact_id, subject in (("a", "Denmark"), ("b", "Den Haag"), ("c", "denmark"), ("d", "")):
        known.put(fact_id, subject)
    assert known.in_text("From Den Haag to Denmark") == {"a", "b", "c"}
    assert known.in_text("Danish dens") == set()
    known.drop("a")
    known.drop("a")
    assert known.in_text("DENMARK!") == {"c"}
    known.put("c", "Den Haag")
    assert known.in_text("Denmark") == set()
    assert known.in_text("den haag") == {"b", "c"}
    known.drop("d")


subjects = st.text(alphabet="ab AB1.中国é", max_size=5)


@example(["Sony"], "Sonyの本社は")
@example(["111"], "111中")
@given(st.lists(subjects, max_size=6), st.text(alphabet="ab AB1.中国é", max_size=20))
def test_what_is_named_is_what_would_be_found_one_by_one(many: list[str], text: str) -> None:
    known = Names()
    for n, subject in enumerate(many):
        known.put(str(n), subject)
    one_by_one = {str(n) for n, s in enumerate(many) if names(plain(text), plain(s))}
    assert known.in_text(text) == one_by_one
