"""Wordings that tell no relation: "it, in", "Which country is it located in?".

A fact whose prompt has no word of its own is asked for, or stated, in words that have none either,
while every relation of the bank is as near to it as its own.
"""

import re

from policies.asking.relation_bank import PRONOUN

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)?")
_AUXILIARIES = frozenset(
    ("is", "was", "are", "were", "does", "do", "did", "has", "have", "had", "can", "could", "be")
)
_ARTICLES = frozenset(("the", "a", "an"))
_PREPOSITIONS = frozenset(("in", "by", "from", "of", "as", "on", "for", "to", "with", "at"))
_WITHIN = frozenset(("within", "inside", "at"))
_PLACED = frozenset(("located", "situated"))
_FOUND = frozenset(("found", "find", "you", "one"))  # in a place, too
_QUESTION_WORDS = frozenset(("who", "whom", "whose", "what", "which"))
MOST_ANSWER_WORDS = 3  # behind "which" or "what", that tell the answer's kind

BareWording = tuple[str, ...]
"""The subject, as a pronoun, and the prepositions of a wording, in their order."""


def reduce_statement(statement: str) -> BareWording | None:
    """Reduce a sentence up to its target, with a pronoun for the subject; None where a word of it
    may tell a relation."""
    return _reduce([word.lower() for word in _WORD.findall(statement)])


def reduce_question(question: str) -> BareWording | None:
    """Reduce a question, with a pronoun for the subject; None where a word of it may tell a
    relation, or there is no question word. "In which city is it?" is as "Which city is it in?"."""
    words = [word.lower() for word in _WORD.findall(question)]
    place = next((n for n, word in enumerate(words) if word in {*_QUESTION_WORDS, "where"}), None)
    if place is None:
        return None
    before, asked, behind = words[:place], words[place], words[place + 1 :]
    if asked == "where":
        return _reduce([*before, *behind, *(() if behind[-1:] in (["in"], ["at"]) else ("in",))])
    kind = next((n for n, word in enumerate(behind) if word in _AUXILIARIES), None)
    if asked in ("which", "what", "whose") and kind is not None and kind <= MOST_ANSWER_WORDS:
        behind = behind[kind:]
    return _reduce([*behind, *before])


def _reduce(words: list[str]) -> BareWording | None:
    kept = [word for word in words if word not in _AUXILIARIES | _ARTICLES]
    kept = ["in" if word in _WITHIN else word for word in kept]
    if _PREPOSITIONS.isdisjoint(kept) and not _PLACED.isdisjoint(kept):
        kept.append("in")  # "Which place is it located?"
    if "in" in kept:
        kept = [word for word in kept if word not in _PLACED | _FOUND]
    if PRONOUN not in kept or not set(kept) <= {PRONOUN, *_PREPOSITIONS}:
        return None
    return tuple(kept)
