"""Sanitizing of untrusted text, such as facts, for terminals, which obey control characters.

Stored text stays as it is; only text to be shown is cleaned.
"""

import unicodedata

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Marks that change the direction of the text that follows, and marks that hide text.
_BIDI_MARKS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_HIDDEN_MARKS = frozenset("\ufeff\U000e0001") | {chr(n) for n in range(0xE0020, 0xE0080)}
# Control characters, half surrogates, line and paragraph separators.
_UNSAFE_CATEGORIES = frozenset(("Cc", "Cs", "Zl", "Zp"))


def clean_text(text: object, lines: bool = False) -> str:
    """Replace every character that could act on a terminal or deceive its reader.

    With `lines`, keep line breaks and tabs, for text that is shown as a block of its own.
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(c if c in kept or _is_safe(c) else REPLACEMENT for c in text)


def clip_text(text: object, width: int) -> str:
    """Clean the text, and shorten it to `width` characters."""
    cleaned = clean_text(text)
    return cleaned if len(cleaned) <= width else cleaned[: width - 1] + "…"


def _is_safe(character: str) -> bool:
    unsafe = unicodedata.category(character) in _UNSAFE_CATEGORIES
    return not (unsafe or character in _BIDI_MARKS or character in _HIDDEN_MARKS)
