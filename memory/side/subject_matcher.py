"""Which subjects a text names: the same words, whatever their case and punctuation."""

import unicodedata
from collections import defaultdict


def normalize_text(text: str) -> str:
    """Letters and digits of one case and width, single spaces for all else."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in folded).split())


def contains_subject(text: str, subject: str) -> bool:
    """Whether a plain text has the plain subject in it as whole words. An empty one is in none.

    Scripts without capitals may write words without a space between, so that a word's end cannot
    be seen there: in those the letters are enough.
    """
    at = text.find(subject) if subject else -1
    while at >= 0:
        end = at + len(subject)
        if _is_word_boundary(text[max(at - 1, 0) : at + 1]) and _is_word_boundary(
            text[end - 1 : end + 1]
        ):
            return True
        at = text.find(subject, at + 1)
    return False


def _is_word_boundary(pair: str) -> bool:
    """Whether two characters side by side may belong to two words; one alone stands at an edge."""
    return len(pair) < 2 or not all(map(_is_spaced_script, pair))


def _is_spaced_script(char: str) -> bool:
    """Whether words of this character's script stand apart: digits, and letters with capitals."""
    return char.isdigit() or char.upper() != char.lower()


class SubjectMatcher:
    """The subjects of many facts, so kept that a text need not be compared with each of them."""

    def __init__(self) -> None:
        self._subject_by_fact: dict[str, str] = {}  # plain, by fact
        self._facts_by_subject: dict[str, set[str]] = defaultdict(set)  # by plain subject
        self._subjects_by_part: dict[str, set[str]] = defaultdict(
            set
        )  # by a part that a text must have

    def add_subject(self, fact_id: str, subject: str) -> None:
        """Keep a fact's subject; in the place of another one that it may have had."""
        self.remove_fact(fact_id)
        known = self._subject_by_fact[fact_id] = normalize_text(subject)
        self._facts_by_subject[known].add(fact_id)
        self._subjects_by_part[_pick_lookup_part(known)].add(known)

    def remove_fact(self, fact_id: str) -> None:
        """Forget a fact."""
        subject = self._subject_by_fact.pop(fact_id, None)
        if subject is None:
            return
        self._facts_by_subject[subject].discard(fact_id)
        if not self._facts_by_subject[subject]:
            del self._facts_by_subject[subject]
            self._subjects_by_part[_pick_lookup_part(subject)].discard(subject)

    def find_named_facts(self, text: str) -> set[str]:
        """The facts whose subject a text names."""
        said = normalize_text(text)
        # A script's end is a word's. Every letter and digit of ASCII stands in words apart.
        apart = (
            said if said.isascii() else "".join(c if _is_spaced_script(c) else " " for c in said)
        )
        parts = set(apart.split())
        if apart != said:  # else no subject is in it that is kept by its first letters
            parts.update(said, (said[n : n + 2] for n in range(len(said))))
        near = set[str]().union(*(self._subjects_by_part.get(part, ()) for part in parts))
        return {
            n
            for subject in near
            if contains_subject(said, subject)
            for n in self._facts_by_subject[subject]
        }


def _pick_lookup_part(subject: str) -> str:
    """A part of a plain subject that is found again in each text that names it: its longest word;
    its first two letters where its words may not stand apart. Nothing of an empty one."""
    if all(c == " " or _is_spaced_script(c) for c in subject):
        return max(subject.split(), key=len, default="")
    return subject[:2]
