import pytest

from memory.naming import names, plain


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
