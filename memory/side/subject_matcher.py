"""Matching of subjects in text: the same words, regardless of case and punctuation."""

import unicodedata
from collections import defaultdict


def normalize_text(text: str) -> str:
    """Fold letters and digits to one case and width, and all else to single spaces."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in folded).split())


def contains_subject(text: str, subject: str) -> bool:
    """Check that a normalized text contains the normalized subject as whole words; an empty one
    never is.

    Scripts without capitals may write words without spaces, so that a word's end is not visible:
    in those the letters are enough.
    """
    at = text.find(subject) if subject else -1
    while at >= 0:
        end = at + len(subject)
        edges = text[max(at - 1, 0) : at + 1], text[end - 1 : end + 1]
        if all(map(_is_word_boundary, edges)):
            return True
        at = text.find(subject, at + 1)
    return False


def _is_word_boundary(pair: str) -> bool:
    """Check that a word may end between two adjacent characters; one alone is at an edge."""
    return len(pair) < 2 or not all(map(_is_spaced_script, pair))


def _is_spaced_script(char: str) -> bool:
    """Check that the character's script separates words: digits, and letters with capitals."""
    return char.isdigit() or char.upper() != char.lower()


class SubjectMatcher:
    """Subjects of many facts, indexed so that a text is compared with few of them."""

    def __init__(self) -> None:
        # Subjects are normalized; a part of one is in every text that names it.
        self._subject_by_fact: dict[str, str] = {}
        self._facts_by_subject: dict[str, set[str]] = defaultdict(set)
        self._subjects_by_part: dict[str, set[str]] = defaultdict(set)

    def add_subject(self, fact_id: str, subject: str) -> None:
        """Set the subject of a fact."""
        self.remove_fact(fact_id)
        known = self._subject_by_fact[fact_id] = normalize_text(subject)
        self._facts_by_subject[known].add(fact_id)
        self._subjects_by_part[_pick_lookup_part(known)].add(known)

    def remove_fact(self, fact_id: str) -> None:
        """Remove a fact, if it is there."""
        subject = self._subject_by_fact.pop(fact_id, None)
        if subject is None:
            return
        self._facts_by_subject[subject].discard(fact_id)
        if not self._facts_by_subject[subject]:
            del self._facts_by_subject[subject]
            self._subjects_by_part[_pick_lookup_part(subject)].discard(subject)

    def find_named_facts(self, text: str) -> set[str]:
        """Return the facts whose subject a text names."""
        plain = normalize_text(text)
        # A change of script ends a word. ASCII needs no check: all of it is spaced.
        spaced = plain
        if not plain.isascii():
            spaced = "".join(c if _is_spaced_script(c) else " " for c in plain)
        parts = set(spaced.split())
        if spaced != plain:  # else no subject in it is indexed by its first letters
            parts.update(plain, (plain[n : n + 2] for n in range(len(plain))))
        near = set[str]().union(*(self._subjects_by_part.get(part, ()) for part in parts))
        named = (self._facts_by_subject[s] for s in near if contains_subject(plain, s))
        return set[str]().union(*named)


def _pick_lookup_part(subject: str) -> str:
    """Return a part of a normalized subject that is in each text that names it: its longest word,
    or its first two letters when its script may not separate words; "" of an empty one."""
    if all(c == " " or _is_spaced_script(c) for c in subject):
        return max(subject.split(), key=len, default="")
    return subject[:2]
