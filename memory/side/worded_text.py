"""Texts cut into words that are equal however people write them.

Words are folded to letters without case, width and accents; accents of other scripts than the Latin
stay. What stands between two words is kept as one character: a name may be written without some of
it (`Coca-Cola`, `O'Brien`, `J.R.R.`), and not without the rest.
"""

import re
import unicodedata
from dataclasses import dataclass

from memory.side.name_words import ABBREVIATIONS

# Kinds of characters: letters with case and without, digits, marks and invisible characters, and
# signs that end a word, as in `C++` and, after a single letter, `C#`.
LOWER, UPPER, CASELESS, DIGIT, MARK, PLUS, SHARP = "a", "A", "c", "0", "m", "+", "#"
# Other kinds, which are also what stands between two words; "" is nothing.
HYPHEN, APOSTROPHE, SLASH, DOT, SPACE, BRACKET = "-", "'", "/", ".", " ", "("
COMMA, PAUSE, LINE, STOP, AMPERSAND = ",", ";", "\n", "!", "&"
SOFT_GAPS = frozenset((HYPHEN, APOSTROPHE, SLASH, DOT))  # others leave them out, or put a space

_CHARS_BY_KIND = (
    (HYPHEN, "-\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"),
    (
        APOSTROPHE,
        "'`\u00b4\u02b9\u02bb\u02bc\u02be\u02bf\u05f3\u05f4\u2018\u2019\u201b\u2032\uff07",
    ),
    (SLASH, "/\u00b7\u2022\u30fb\uff65\u2044"),  # also the dots between names in Chinese, Japanese
    (DOT, ".\uff0e"),
    (STOP, "!?;\u2026\u3002\uff01\uff1f\uff1b\u061f\u0964"),
    (LINE, "\n\v\f\u0085\u2028\u2029"),
    (PLUS, "+"),
    (SHARP, "#\u266f"),
    (MARK, "\uff9e\uff9f"),  # half-width sound marks of Japanese
    (AMPERSAND, "&"),
    (SPACE, "_"),
    (BRACKET, "("),
    (COMMA, ",\uff0c\u3001\u060c"),
)
_KOREAN_PARTS = "\u1160", "\u11ff"  # vowels and ends of syllables, written apart
_WORD = re.compile(r"(?<![aA0m])A#(?![aA0c])|[aA0][aA0m]*(?:\++(?![aA0c]))?|cm*|&")
_LATIN_MARKS = re.compile("(?<=[a-z])[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff]+")
_LATIN_NAME = re.compile(r"LATIN SMALL (?:LETTER|LIGATURE) (?:DOTLESS )?([A-Z]{1,2})(?: WITH .+)?")
_OTHER_LETTERS = {"ð": "d", "þ": "th"}


class CharKinds(dict[int, str]):
    """Kinds of characters, found when they are first asked for; for `str.translate`."""

    def __missing__(self, code: int) -> str:
        kind = self[code] = _find_kind(chr(code))
        return kind


def _find_kind(char: str) -> str:
    for kind, chars in _CHARS_BY_KIND:
        if char in chars:
            return kind
    if char.isdigit():
        return DIGIT
    if char.upper() != char.lower():
        return UPPER if char != char.lower() else LOWER
    first, last = _KOREAN_PARTS
    if first <= char <= last or unicodedata.category(char) in ("Mn", "Mc", "Me", "Cf"):
        return MARK
    if char.isalnum():
        return CASELESS
    return SPACE if char.isspace() else PAUSE


class LetterFolds(dict[int, str]):
    """Base letters of small letters that do not decompose, and nothing for invisible characters;
    for `str.translate`."""

    def __missing__(self, code: int) -> str:
        letters = self[code] = _find_base_letters(chr(code))
        return letters


def _find_base_letters(char: str) -> str:
    if char.isascii():
        return char
    if unicodedata.category(char) == "Cf":
        return ""
    latin = _LATIN_NAME.fullmatch(unicodedata.name(char, ""))
    return latin[1].lower() if latin else _OTHER_LETTERS.get(char, char)


@dataclass(frozen=True, slots=True)
class WordedText:
    """Words of a text, folded; where they start and end in it; and the gaps around them.

    `gaps[n]` is before word n, and the last one after all words. `kinds` has the kind of each
    character of the text.
    """

    words: list[str]
    starts: list[int]
    ends: list[int]
    gaps: list[str]
    kinds: str

    def get_kinds(self, first: int, end: int | None = None) -> str:
        """Return the kinds of the characters of a word, or of the words up to `end`."""
        last = first if end is None else end - 1
        return self.kinds[self.starts[first] : self.ends[last]]

    def get_gap_kinds(self, word: int) -> str:
        """Return the kinds of the characters before a word that is not the first."""
        return self.kinds[self.ends[word - 1] : self.starts[word]]

    def has_capital(self, word: int) -> bool:
        """Check that there is such a word with a capital letter, wherever in it (`iPhone`)."""
        return 0 <= word < len(self.words) and UPPER in self.get_kinds(word)


class TextReader:
    """Reader of texts and names, which remembers the characters that it has met."""

    def __init__(self) -> None:
        self._kinds = CharKinds()
        self._folds = LetterFolds()

    def read(self, text: str) -> WordedText:
        """Cut a text into folded words. A letter of a script without capitals is a word: such
        scripts may not separate words."""
        kinds = text.translate(self._kinds)
        spans = [match.span() for match in _WORD.finditer(kinds)]
        starts, ends = [start for start, _ in spans], [end for _, end in spans]
        words = self._fold_words([text[start:end] for start, end in spans])
        gaps = [
            gap if (gap := kinds[end:start]) == SPACE else _find_gap(kinds, end, start, word)
            for end, start, word in zip(ends, starts[1:], words, strict=False)
        ]
        return WordedText(words, starts, ends, [STOP, *gaps, STOP], kinds)

    def _fold_words(self, words: list[str]) -> list[str]:
        """Fold words, all that are not ASCII at once."""
        folded = "\n".join(words).lower().split("\n") if words else []
        others = [n for n, word in enumerate(words) if not word.isascii()]
        lines = unicodedata.normalize("NFKD", "\n".join([words[n] for n in others])).casefold()
        plain = _LATIN_MARKS.sub("", lines.translate(self._folds))
        for n, word in zip(others, unicodedata.normalize("NFC", plain).split("\n"), strict=False):
            folded[n] = word
        return [word if word != AMPERSAND else "and" for word in folded]


def _find_gap(kinds: str, end: int, start: int, word: str) -> str:
    """Return what stands between a word, which ends at `end`, and the next one."""
    gap = kinds[end:start]
    if gap == "" and AMPERSAND in kinds[end - 1 : end + 1]:
        return HYPHEN  # others write R & B
    if gap in ("", HYPHEN, APOSTROPHE, SLASH, BRACKET):
        return gap
    lines, plain = gap.count(LINE), gap.replace(LINE, SPACE).strip()
    if plain == DOT and gap[0] == DOT:
        return _find_dot(kinds, end, start, word)
    if lines > 1 or DOT in gap or STOP in gap:
        return STOP
    if plain == HYPHEN and gap[0] == HYPHEN and lines:  # a word divided between two lines
        return HYPHEN
    if plain == "":
        # A line that ends in lower case may continue in the next one; a title does not.
        is_wrapped = kinds[end - len(word) : end].strip(LOWER + CASELESS + MARK) == ""
        return SPACE if is_wrapped or not lines else PAUSE
    return COMMA if plain == COMMA else PAUSE


def _find_dot(kinds: str, end: int, start: int, word: str) -> str:
    """Return what a full stop is after a word: that of initials or of a domain, of an abbreviation,
    or the end of a sentence."""
    is_initial = len(word) == 1 and kinds[end - 1] == UPPER
    is_attached = start - end == 1
    if is_attached and (is_initial or word in ABBREVIATIONS or kinds[start] != UPPER):
        return DOT
    if is_initial:
        return DOT if kinds[start : start + 2] in (UPPER + DOT, UPPER) else SPACE
    return SPACE if word in ABBREVIATIONS and not is_attached else STOP
