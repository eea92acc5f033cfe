"""Rule that tells whether a name in a text is part of a longer one, which is another name.

Writers tell it by capitals: a capitalised word beside a name belongs to it (`Samsung Heavy
Industries`), also across `of` or `&` (`Bank of England`), and so does a number after it (`Windows
95`). It does not where it is a common opener of sentences (`Is Paris`), an office (`President
Obama`) or the form of a company (`Samsung Ltd`), nor where punctuation stands between. Where
capitals tell nothing, as in a text without them, the name is taken to be whole.
"""

from dataclasses import dataclass

from memory.side.name_words import (
    ARABIC_ARTICLES,
    ASPECTS,
    CLITICS,
    COMPANY_FORMS,
    ELISIONS,
    EPITHETS,
    GRAMMAR_WORDS,
    HEADLINE_WORDS,
    INSTITUTIONS,
    NOBLES,
    OFFICES,
    OFFICES_AFTER,
    OPENERS,
    PARTICLE_ARTICLES,
    PARTICLES,
    PRONOUN_VERBS,
    TIMES,
)
from memory.side.worded_text import (
    AMPERSAND,
    APOSTROPHE,
    BRACKET,
    CASELESS,
    COMMA,
    DIGIT,
    DOT,
    HYPHEN,
    LOWER,
    PAUSE,
    SPACE,
    STOP,
    UPPER,
    WordedText,
)

MAX_CLAUSE_WORDS = 20  # looked at on each side of a name
MAX_JOINED_WORDS = 6  # of those that hyphens join to it
MIN_HEADLINE_WORDS = 4
CLAUSE_ENDS = frozenset((COMMA, PAUSE, STOP))


@dataclass(slots=True)
class NamePlace:
    """Words of a text that have a name, from `start` up to `end`.

    `is_careful`: the name has its capitals, or is to have none, so that others may tell something.
    """

    text: WordedText
    start: int
    end: int
    is_careful: bool

    def is_part_of_longer(self) -> bool:
        """Check that what stands beside the name makes it part of a longer one."""
        return self._extends_left() or self._extends_right(self.end)

    @property
    def _has_one_word(self) -> bool:
        return self.end - self.start == 1

    def _are_capitals_told(self) -> bool:
        """Check that a capital beside the name tells that it belongs to it."""
        return self.is_careful and tells_by_capitals(self.text, self.start, self.end)

    def _get_first_kind(self, word: int) -> str:
        return self.text.kinds[self.text.starts[word]]

    def _opens_sentence(self, word: int) -> bool:
        """Check that a word may open a sentence, which can end with an abbreviation."""
        gap = self.text.gaps[word]
        return gap in (STOP, PAUSE) or (gap == SPACE and DOT in self.text.get_gap_kinds(word))

    def _extends_left(self) -> bool:
        text, before, gap = self.text, self.start - 1, self.text.gaps[self.start]
        if gap in ("", STOP) or self._get_first_kind(self.start) == CASELESS:
            return False
        if gap == HYPHEN:
            return self._is_capital_joined(before, -1)
        if gap == DOT:
            return True
        if gap == APOSTROPHE:
            if text.words[before] not in ELISIONS:
                return True  # Brien in O'Brien
            is_inside = text.has_capital(before) and not self._opens_sentence(before)
            return self._is_joined(before) or (is_inside and self._are_capitals_told())
        if gap != SPACE:
            return False
        if text.has_capital(before):
            return self._belongs_before(before) and self._are_capitals_told()
        return self._is_joined(before)

    def _belongs_before(self, before: int) -> bool:
        """Check that a capitalised word before the name belongs to it."""
        word = self.text.words[before]
        if word in OFFICES or word in TIMES or word in ("i", "the"):
            return False
        if self._has_one_word:
            # Openers in other scripts than the Latin are not known.
            is_opener = word in OPENERS or not word.isascii()
            return not (self._opens_sentence(before) and is_opener)
        # Several words are rather a whole name, which any word may precede in a sentence's opening;
        # so may initials that are not a person's.
        is_initial = len(word) == 1 and DOT in self.text.get_gap_kinds(self.start)
        return not (self._opens_sentence(before) or is_initial)

    def _is_joined(self, before: int) -> bool:
        """Check that a particle before the name joins it to a capitalised word: `Bank of`."""
        text, at = self.text, before
        if self._get_particle(at) in PARTICLE_ARTICLES and self._get_particle(at - 1) in PARTICLES:
            if not text.has_capital(self.start) or text.gaps[at] != SPACE:
                return False  # supporters of the airport
            at -= 1
        head, particle = at - 1, self._get_particle(at)
        if particle not in PARTICLES or text.gaps[at] not in (SPACE, HYPHEN):
            return False
        if not text.has_capital(head) or particle == AMPERSAND:
            return text.has_capital(head)
        word = text.words[head]
        if word in OFFICES:
            return word in NOBLES
        if word in ASPECTS:
            return text.gaps[head] == SPACE and text.has_capital(head - 1)
        return not (self._opens_sentence(head) and word in OPENERS)

    def _get_particle(self, word: int) -> str:
        """Return a word that may be a particle: one in lower case, or the sign for `and`."""
        if not 0 <= word < len(self.text.words):
            return ""
        kinds = self.text.get_kinds(word)
        return kinds if kinds == AMPERSAND else "" if UPPER in kinds else self.text.words[word]

    def _extends_right(self, after: int) -> bool:
        text, gap = self.text, self.text.gaps[after]
        if gap in ("", STOP) or self._get_first_kind(after - 1) == CASELESS:
            return False
        word = text.words[after]
        if gap == HYPHEN:
            return self._is_capital_joined(after, 1)
        if gap == APOSTROPHE:
            return word not in CLITICS
        if gap == DOT:
            return word not in COMPANY_FORMS  # Amazon.com
        if gap == BRACKET:
            return self._get_first_kind(after) != DIGIT  # copper(II), but not Bach(1685-1750)
        if gap != SPACE or self._is_stopped(after):
            return False
        if DIGIT in text.get_kinds(after):
            return self._is_numbered(after)
        if text.has_capital(after):
            return self._belongs_after(after)
        return text.has_capital(after - 1) and (word in INSTITUTIONS or self._joins(after))

    def _is_stopped(self, after: int) -> bool:
        """Check that a full stop ends a name of several words, rather than an initial in it."""
        return after - self.start > 1 and DOT in self.text.get_gap_kinds(after)

    def _is_numbered(self, after: int) -> bool:
        """Check that a word with digits numbers the name: not a date, a score or `16-valve`."""
        return self.text.gaps[after + 1] != HYPHEN and self.text.words[after - 1] not in TIMES

    def _belongs_after(self, after: int) -> bool:
        """Check that a capitalised word after the name belongs to it."""
        word = self.text.words[after]
        if word in COMPANY_FORMS:
            return self._extends_right(after + 1)
        if word in TIMES or word in OFFICES_AFTER:
            return False
        following = self.text.words[after + 1 : after + 2]
        is_pronoun = word == "i" and not PRONOUN_VERBS.isdisjoint(following)
        return not is_pronoun and self._are_capitals_told()

    def _joins(self, after: int) -> bool:
        """Check that a particle after the name joins a capitalised word to it: `of England`."""
        text, at, particle = self.text, after, self._get_particle(after)
        if particle == "the":
            return text.has_capital(at + 1) and text.words[at + 1] in EPITHETS
        if particle in ARABIC_ARTICLES and text.gaps[at + 1] == HYPHEN:
            return text.has_capital(at + 1)
        if particle not in PARTICLES or text.gaps[at + 1] not in (SPACE, APOSTROPHE, HYPHEN):
            return False
        if particle == "of" and after - self.start > 1:
            return False  # a whole name, and where it belongs: Ian Hodder of Cambridge
        if self._get_particle(at + 1) in PARTICLE_ARTICLES and text.gaps[at + 2] == SPACE:
            at += 1
        return text.has_capital(at + 1)

    def _is_capital_joined(self, word: int, step: int) -> bool:
        """Check that words joined by hyphens, from one beside the name on, have a capital letter
        or begin with a digit: `Paris-Soir`, and not `Paris-based`."""
        text = self.text
        for _ in range(MAX_JOINED_WORDS):
            if text.has_capital(word) or self._get_first_kind(word) == DIGIT:
                return True
            if text.gaps[word if step < 0 else word + 1] not in (HYPHEN, APOSTROPHE):
                break
            word += step
        return False


def tells_by_capitals(text: WordedText, start: int, end: int) -> bool:
    """Check that the clause around these words has capitals for names only: it is not all in
    capitals, nor a headline."""
    first, last = start, end
    while text.gaps[first] not in CLAUSE_ENDS and start - first < MAX_CLAUSE_WORDS:
        first -= 1
    while text.gaps[last] not in CLAUSE_ENDS and last - end < MAX_CLAUSE_WORDS:
        last += 1
    around = [*range(first, start), *range(end, last)]
    if around and LOWER not in text.get_kinds(first, last):
        return False
    if any(not text.has_capital(n) and text.words[n] not in HEADLINE_WORDS for n in around):
        return True
    # A single capital may be an initial, and the first word has one in any case.
    capitals = (text.words[n] for n in around if n > first and text.get_kinds(n)[:2] == "Aa")
    return last - first < MIN_HEADLINE_WORDS or GRAMMAR_WORDS.isdisjoint(capitals)
