"""Joins of a prompt and its target: with a space, or without one where text is written so.

A fact may say its join itself. Otherwise the script and the signs at the seam decide. Chinese and
Japanese have no space before anything, and the scripts of Thailand, Laos, Cambodia and Burma none
before their own words.
"""

import re
import unicodedata

JOIN_WORDS = {"no-space": "", "space": " "}
"""The joins that a fact may say, by their names."""
_CLOSE = "\u2e80-\u2fdf\u3000-\u30ff\u3100-\u312f\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
_CLOSE += "\uf900-\ufaff\ufe30-\ufe4f\uff01-\uff9f\U00020000-\U0003ffff"  # Chinese and Japanese
_LOOSE = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u19e0-\u19ff\ua9e0-\ua9ff\uaa60-\uaa7f"
_CLOSE_MARKS = "\u3001\u3002\uff0c\uff0e\uff1a\uff1b\uff01\uff1f\uff05"  # their commas and stops
_CLOSE_CHAR, _UNSPACED_CHAR = re.compile(f"[{_CLOSE}]"), re.compile(f"[{_CLOSE}{_LOOSE}]")
_SPACED_WORD = re.compile(f"[^\\W\\d_{_CLOSE}{_LOOSE}]+")
# What opens at a prompt's end: a path, an address, a number sign that no letter stands before
# (`C#`), a sign of currency that no number does (`5 €`).
_OPEN_END = re.compile(r"[/\\@]$|(?<!\w)#$")
_PRICED = re.compile(r"\d\s?\S$")
_QUOTES = frozenset("\"'\u2018\u2019\u201c\u201d\u00ab\u00bb\u2039\u203a")
# What closes at a target's beginning: marks that no word follows (`.NET`, `!Kung`), a comma
# (also of `,000`), and the ends of shortened words; not those of `'s-Gravenhage`.
_CLOSED_START = re.compile(
    r""",|[.;:!?%‰…'"\u2019\u201d\u00bb\u203a]+(?=[\s,)\]]|$)|['\u2019](?:s|re|ve|ll|d|m)(?![\w-])""",
    re.IGNORECASE,
)


def find_join(prompt: str, target: str) -> str:
    """Return what stands between a prompt and its target where the fact does not say it."""
    if not prompt or not target or prompt[-1].isspace() or target[0].isspace():
        return ""
    if _has_open_end(prompt, target) or _has_closed_start(target):
        return ""
    if _CLOSE_CHAR.match(prompt[-1]):
        return ""
    if not _UNSPACED_CHAR.match(target):
        return " "
    unspaced, spaced = len(_UNSPACED_CHAR.findall(prompt)), len(_SPACED_WORD.findall(prompt))
    return "" if _UNSPACED_CHAR.match(prompt[-1]) or unspaced >= spaced else " "


def join_texts(prompt: str, target: str, join: str | None = None) -> str:
    """Return a prompt with its target behind it; `join`: as the fact says it."""
    if join is None or prompt[-1:].isspace():
        join = find_join(prompt, target)
    return prompt + join + target


def is_unspaced(text: str) -> bool:
    """Check that a text begins or ends in a script that puts no space between words."""
    return any(_UNSPACED_CHAR.match(char) for char in (text[:1], text[-1:]))


def _has_open_end(prompt: str, target: str) -> bool:
    """Check that a prompt ends in a sign that the next word is written right behind."""
    last, before = prompt[-1], prompt[-2:-1]
    if last in _QUOTES:
        is_left = unicodedata.category(last) == "Pi" and _CLOSE_CHAR.match(before)
        return bool(not before or before.isspace() or before in "([{" or is_left)
    kind = unicodedata.category(last)
    if kind == "Pd":  # a dash between two blanks stands apart, but a minus belongs to its number
        return not (before == "" or before.isspace()) or target[0].isdigit()
    if kind == "Sc":
        return not _PRICED.search(prompt)
    return kind == "Ps" or last == "\u2212" or _OPEN_END.search(prompt) is not None


def _has_closed_start(target: str) -> bool:
    """Check that a target begins with a sign that is written right behind a word."""
    if len(target) > 1 and not any(map(str.isalnum, target)):
        return False  # a name or a sign of marks alone: `!!!`, `:)`
    is_closing = unicodedata.category(target[0]) == "Pe" or target[0] in _CLOSE_MARKS
    return is_closing or _CLOSED_START.match(target) is not None
