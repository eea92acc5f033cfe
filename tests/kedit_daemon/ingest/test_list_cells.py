"""Several texts in one cell, in every notation that tools write."""

import json

import pytest

from kedit_daemon.ingest.list_cells import split_cell
from kedit_daemon.ingest.record_splitter import UnreadableText

TEXTS = ["The employer of {} is", "it's", 'he "said"', "a|b", "é\n", "back\\slash", "😀", "[x]", ""]


@pytest.mark.parametrize("written", [repr(TEXTS), json.dumps(TEXTS), repr(tuple(TEXTS))])
def test_a_list_of_python_or_json_comes_back(written: str) -> None:
    assert split_cell(f" {written} ") == TEXTS


@pytest.mark.parametrize(
    ("cell", "texts"),
    [
        ("a|b", ["a", "b"]),
        ("a||", ["a"]),
        ("one", ["one"]),
        ("['a' 'b'\n 'c']", ["a", "b", "c"]),
        ("{'a', 'b'}", ["a", "b"]),
        ("('a',)", ["a"]),
        ("[]", []),
        ("[Q] Who is {}?", ["[Q] Who is {}?"]),
        ("{}", ["{}"]),
        ("{} is|{} lies in", ["{} is", "{} lies in"]),
        ("()", ["()"]),
        ("(a) {} is", ["(a) {} is"]),
        (r'["\u00e9", "\ud83d\ude00"]', ["é", "😀"]),
    ],
)
def test_notations_of_several_texts(cell: str, texts: list[str]) -> None:
    assert split_cell(cell) == texts


@pytest.mark.parametrize(
    "cell", ["[staff, verbatim]", "['a', 'b'", "['a', 7]", "['a'b]", "[1, 2]", r"['\q']", "['a]"]
)
def test_a_list_that_cannot_be_read_is_no_text(cell: str) -> None:
    with pytest.raises(UnreadableText) as caught:
        split_cell(cell)
    assert 'a|b, or as ["a", "b"]' in caught.value.remedy
