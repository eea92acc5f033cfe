"""Which subjects a text names: the same words, whatever their case and punctuation."""

import unicodedata
from collections import defaultdict


def plain(text: str) -> str:
    """Letters and digits of one case and width, single spaces for all else."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in folded).split())


def names(text: str, subject: str) -> bool:
    """Whether a plain text has the plain subject in it as whole words. An empty one is in none.

    Scripts without capitals may write words without a space between, so that a word's end cannot
    be seen there: in those the letters are enough.
    """
    at = text.find(subject) if subject else -1
    while at >= 0:
        end = at + len(subject)
        if _apart(text[max(at - 1, 0) : at + 1]) and _apart(text[end - 1 : end + 1]):
            return True
        at = text.find(subject, at + 1)
    return False


def _apart(pair: str) -> bool:
    """Whether two characters side by side may belong to two words; one alone stands at an edge."""
    return len(pair) < 2 or not all(map(_joins, pair))


def _joins(char: str) -> bool:
    """Whether words of this character's script stand apart: digits, and letters with capitals."""
    return char.isdigit() or char.upper() != char.lower()


class Names:
    """The subjects of many facts, so kept that a text need not be compared with each of them."""

    def __init__(self) -> None:
        self._subject: dict[str, str] = {}  # plain, by fact
        self._facts: dict[str, set[str]] = defaultdict(set)  # by plain subject
        self._subjects: dict[str, set[str]] = defaultdict(set)  # by a part that a text must have

    def put(self, fact_id: str, subject: str) -> None:
        """Keep a fact's subject; in the place of another one that it may have had."""
        self.drop(fact_id)
        known = self._subject[fact_id] = plain(subject)
        self._facts[known].add(fact_id)
        self._subjects[_part(known)].add(known)

    def drop(self, fact_id: str) -> None:
        """Forget a fact."""
        subject = self._subject.pop(fact_id, None)
        if subject is None:
            return
        self._facts[subject].discard(fact_id)
        if not self._facts[subject]:
            del self._facts[subject]
            self._subjects[_part(subject)].discard(subject)

    def in_text(self, text: str) -> set[str]:
        """The facts whose subject a text names."""
        said = plain(text)
        # A script's end is a word's. Every letter and digit of ASCII stands in words apart.
        apart = said if said.isascii() else "".join(c if _joins(c) else " " for c in said)
        parts = set(apart.split())
        if apart != said:  # else no subject is in it that is kept by its first letters
            parts.update(said, (said[n : n + 2] for n in range(len(said))))
        near = set[str]().union(*(self._subjects.get(part, ()) for part in parts))
        return {n for subject in near if names(said, subject) for n in self._facts[subject]}


def _part(subject: str) -> str:
    """A part of a plain subject that is found again in each text that names it: its longest word;
    its first two letters where its words may not stand apart. Nothing of an empty one."""
    if all(c == " " or _joins(c) for c in subject):
        return max(subject.split(), key=len, default="")
    return subject[:2]
