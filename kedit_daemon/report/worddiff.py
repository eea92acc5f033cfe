"""A diff of two answers, word by word, in one line."""

from collections.abc import Iterator
from difflib import SequenceMatcher

SAME, OLD, NEW = "same", "old", "new"


def diff_words(before: str, after: str) -> Iterator[tuple[str, str]]:
    """Yield (SAME, OLD or NEW, words) in reading order; removed words come before added ones.

    Words are separated by single spaces, so that the parts, joined by spaces, give both texts.
    """
    old, new = before.split(" "), after.split(" ")
    matcher = SequenceMatcher(None, old, new, autojunk=False)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag == "equal":
            yield SAME, " ".join(old[i1:i2])
            continue
        if i2 > i1:
            yield OLD, " ".join(old[i1:i2])
        if j2 > j1:
            yield NEW, " ".join(new[j1:j2])
