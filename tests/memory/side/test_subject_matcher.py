import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from memory.side.subject_matcher import SubjectMatcher, contains_subject, normalize_text


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
    assert contains_subject(normalize_text(text), normalize_text(subject))


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
    assert not contains_subject(normalize_text(text), normalize_text(subject))


def test_a_text_names_all_facts_on_its_subjects() -> None:
    known = SubjectMatcher()
    for fact_id, subject in (("a", "Denmark"), ("b", "Den Haag"), ("c", "denmark"), ("d", "")):
        known.add_subject(fact_id, subject)
    assert known.find_named_facts("From Den Haag to Denmark") == {"a", "b", "c"}
    assert known.find_named_facts("Danish dens") == set()
    known.remove_fact("a")
    known.remove_fact("a")
    assert known.find_named_facts("DENMARK!") == {"c"}
    known.add_subject("c", "Den Haag")
    assert known.find_named_facts("Denmark") == set()
    assert known.find_named_facts("den haag") == {"b", "c"}
    known.remove_fact("d")


subjects = st.text(alphabet="ab AB1.中国é", max_size=5)


@example(["Sony"], "Sonyの本社は")
@example(["111"], "111中")
@given(st.lists(subjects, max_size=6), st.text(alphabet="ab AB1.中国é", max_size=20))
def test_what_is_named_is_what_would_be_found_one_by_one(many: list[str], text: str) -> None:
    known = SubjectMatcher()
    for n, subject in enumerate(many):
        known.add_subject(str(n), subject)
    one_by_one = {
        str(n)
        for n, s in enumerate(many)
        if contains_subject(normalize_text(text), normalize_text(s))
    }
    assert known.find_named_facts(text) == one_by_one
