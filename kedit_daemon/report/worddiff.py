"""Two answers as one line that shows what has changed, word by word."""

from collections.abc import Iterator
from difflib import SequenceMatcher

SAME, OLD, NEW = "same", "old", "new"


def diff_words(before: str, after: str) -> Iterator[tuple[str, str]]:
    """(SAME, OLD or NEW, words) in reading order; what was taken out stands before what came.

    Words are what single spaces part, so that the parts joined by spaces give the texts again.
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
