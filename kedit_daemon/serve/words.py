"""Two answers side by side: which words went, and which came."""

from difflib import SequenceMatcher

SAME, GONE, NEW = "same", "gone", "new"


def word_diff(before: str, after: str) -> list[tuple[str, str]]:
    """Runs of words in reading order, each SAME, GONE (from `before`) or NEW (in `after`)."""
    was, now = before.split(), after.split()
    found: list[tuple[str, str]] = []
    for _, i, j, k, m in SequenceMatcher(None, was, now, autojunk=False).get_opcodes():
        if was[i:j] == now[k:m]:
            found.append((SAME, " ".join(was[i:j])))
            continue
        runs = ((GONE, was[i:j]), (NEW, now[k:m]))
        found += [(kind, " ".join(words)) for kind, words in runs if words]
    return found
