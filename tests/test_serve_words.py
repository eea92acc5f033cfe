import pytest

from kedit_daemon.serve.words import word_diff


@pytest.mark.parametrize(
    ("before", "after", "runs"),
    [
        ("", "", []),
        ("the same  words", "the same words", [("same", "the same words")]),
        ("actor", "architect", [("gone", "actor"), ("new", "architect")]),
        (
            "it lies in Egypt, they say",
            "it lies in South Australia, they say so",
            [
                ("same", "it lies in"),
                ("gone", "Egypt,"),
                ("new", "South Australia,"),
                ("same", "they say"),
                ("new", "so"),
            ],
        ),
        ("one two", "two", [("gone", "one"), ("same", "two")]),
    ],
)
def test_word_diff(before: str, after: str, runs: list[tuple[str, str]]) -> None:
    assert word_diff(before, after) == runs
