"""Wordings of nothing but a subject and prepositions: "it, in", "Which country is it located in?".

A fact whose prompt has no other word is asked for, or stated, in words that have none either, while
every relation of the bank is as near to it as its own.
"""

import re

from policies.asking.relation_bank import PRONOUN

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)?")
_CONTRACTION = re.compile(r"\b(who|what|where)['\u2019]s\b", re.IGNORECASE)
_CAN_BE_FOUND = re.compile(r"\bcan (?:be found|(?:(?:you|one|we|i) find))\b", re.IGNORECASE)
_AUXILIARIES = frozenset(("is", "was", "are", "were", "be", "been"))
_ARTICLES = frozenset(("the", "a", "an"))
_OPENINGS = frozenset(("and", "but", "so"))  # of a second question in a message
_DROPPED = _AUXILIARIES | _ARTICLES
_PLACED = frozenset(("located", "situated"))
_PREPOSITIONS = frozenset(("in", "by", "from", "of", "as", "on", "for", "to", "with"))
_IN = frozenset(("within", "inside", "at"))
# Kinds of an answer that a preposition tells by itself. Another kind tells the relation: "Which
# language is it in?".
_PLACES = frozenset(
    (
        *("place", "location", "area", "region", "continent", "country", "nation", "state"),
        *("province", "county", "district", "territory", "island", "city", "town", "village"),
    )
)
_MAKERS = frozenset(
    ("company", "organization", "organisation", "firm", "maker", "manufacturer", "brand", "studio")
)
_KINDS = {"in": _PLACES, "by": _MAKERS, "from": _PLACES | _MAKERS}

BareWording = tuple[str, ...]
"""The subject, as a pronoun, and the prepositions of a wording, in their order."""


def reduce_statement(statement: str) -> BareWording | None:
    """Reduce a sentence up to its target, with a pronoun for the subject; None where it has a word
    of another kind, or ends in the subject."""
    words = _read_words(statement)
    wording = _reduce(words)
    has_end = words[-1:] != [PRONOUN] and (wording != (PRONOUN,) or words[-1] in _ARTICLES)
    return wording if has_end else None


def reduce_question(question: str) -> BareWording | None:
    """Reduce a question, with a pronoun for the subject; None where it has a word of another kind,
    or no question word. "In which city is it?" is as "Which city is it in?"."""
    words = _read_words(_CONTRACTION.sub(r"\1 is", question))
    if words and words[0] in _OPENINGS:
        words = words[1:]
    asked = next((n for n, w in enumerate(words) if w in ("who", "what", "which", "where")), None)
    if asked is None:
        return None
    before, behind = words[:asked], words[asked + 1 :]
    if words[asked] == "where":
        has_preposition = not {*_PREPOSITIONS, *_IN}.isdisjoint(behind)
        return _reduce([*before, *behind, *(() if has_preposition else ("in",))])
    verb = next((n for n, word in enumerate(behind) if word in _AUXILIARIES), 0)
    wording = _reduce([*behind[verb:], *before])
    if verb and (wording is None or behind[verb - 1] not in _KINDS.get(wording[-1], ())):
        return None
    return wording


def _read_words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(_CAN_BE_FOUND.sub("is", text))]


def _reduce(words: list[str]) -> BareWording | None:
    kept = ["in" if word in _IN else word for word in words if word not in _DROPPED]
    if _PREPOSITIONS.isdisjoint(kept) and not _PLACED.isdisjoint(kept):
        kept.append("in")  # "Which place is it located?"
    kept = [word for word in kept if word not in _PLACED or "in" not in kept]
    if PRONOUN not in kept or not set(kept) <= {PRONOUN, *_PREPOSITIONS}:
        return None
    return tuple(kept)
