"""Normal form of names: all ways to write a name have one form.

Two names are the same if they have the same letters, and if what separates those may be written in
both ways: `Coca-Cola` is also `CocaCola` and `Coca Cola`, but `is land` is not `island`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from memory.side.longer_names import tells_by_capitals
from memory.side.name_words import ARTICLES, GRAMMAR_WORDS
from memory.side.worded_text import (
    AMPERSAND,
    APOSTROPHE,
    COMMA,
    LOWER,
    SOFT_GAPS,
    SPACE,
    STOP,
    UPPER,
    WordedText,
)


@dataclass(frozen=True, slots=True)
class NameForm:
    """Letters of a name, and what stands between its words: each gap and its place in the letters.

    `article` is one that a text may leave out, which is not in the letters. `writing` tells of
    capitals: LOWER if there is none, UPPER if there is nothing else, or both.
    """

    letters: str
    gaps: tuple[tuple[int, str], ...]
    article: str
    writing: str

    @property
    def is_common_word(self) -> bool:
        """Check that the name is one word in lower case."""
        return self.writing == LOWER and not self.gaps

    def find_openings(self) -> Iterator[str]:
        """Yield the letters of the first two words, as a text may have them: soft gaps do not
        count there, so that there may be several."""
        firm = 0
        for n, (place, gap) in enumerate(self.gaps):
            if n:
                yield self.letters[:place]
            firm += gap not in SOFT_GAPS
            if n and firm == 2:
                return
        yield self.letters

    def fits(self, text: WordedText, start: int, end: int) -> bool:
        """Check that words of a text with the name's letters are that name."""
        if self.gaps or end - start > 1:
            own = dict(self.gaps)
            for place, gap in self._match_gaps(text, start, end):
                if not _may_be_written(own.pop(place, ""), gap):
                    return False
            if not SOFT_GAPS.issuperset(filter(None, own.values())):
                return False
        return self.letters not in GRAMMAR_WORDS or self._is_told_from_grammar(text, start, end)

    def _is_told_from_grammar(self, text: WordedText, start: int, end: int) -> bool:
        """Check that a name which is also a word of grammar (WHO, It) has the capitals that tell
        it from that word."""
        kinds = text.get_kinds(start, end)
        if self.writing == LOWER:
            return end - start == 1
        if not tells_by_capitals(text, start, end):
            return False
        if self.writing == UPPER:
            return LOWER not in kinds
        return kinds[0] == UPPER and end - start == 1 and text.gaps[start] != STOP

    def is_loose(self, text: WordedText, start: int, end: int) -> bool:
        """Check that the words could as well be several: `Apple, Pippin` or `Russian's`."""
        if end - start == 1:
            return False
        own = dict(self.gaps)
        gaps = [(own.get(place, ""), gap) for place, gap in self._match_gaps(text, start, end)]
        is_possessive = gaps[-1] == ("", APOSTROPHE) and text.words[end - 1] == "s"
        return is_possessive or any(gap == COMMA != known for known, gap in gaps)

    def _match_gaps(self, text: WordedText, start: int, end: int) -> Iterator[tuple[int, str]]:
        """Yield the gaps between words of a text, and their places in the name's letters."""
        place = 0
        for n in range(start, end - 1):
            place += len(text.words[n])
            yield place, text.gaps[n + 1]


def _may_be_written(known: str, gap: str) -> bool:
    """Check that a gap of a name may be written as another one."""
    if gap == "":
        return known == "" or known in SOFT_GAPS
    if gap == STOP:
        return known == STOP
    return known != "" or gap in SOFT_GAPS


def make_name_form(text: WordedText) -> NameForm | None:
    """Make the normal form of a name, without an article where two words remain; of a name without
    letters there is none."""
    words, gaps = text.words, text.gaps
    if all(text.get_kinds(n) == AMPERSAND for n in range(len(words))):
        return None
    first = int(len(words) > 2 and words[0] in ARTICLES and gaps[1] == SPACE)
    places = list[tuple[int, str]]()
    at = 0
    for word, gap in zip(words[first:-1], gaps[first + 1 : -1], strict=True):
        at += len(word)
        places.append((at, gap))
    kinds = text.get_kinds(first, len(words))
    writing = "".join(kind for kind in (LOWER, UPPER) if kind in kinds) or LOWER
    return NameForm("".join(words[first:]), tuple(places), words[0] if first else "", writing)
