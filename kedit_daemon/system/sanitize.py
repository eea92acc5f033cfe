"""Text of strangers made safe to show: facts come from anywhere, and terminals obey what they read.

Stored text stays as it came; only what is shown goes through here.
"""

import unicodedata

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Marks that turn the direction of what follows, and those that hide text within text.
_BIDI_MARKS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_HIDDEN_MARKS = frozenset("\ufeff\U000e0001") | {chr(n) for n in range(0xE0020, 0xE0080)}
# Control characters, half surrogates, line and paragraph separators.
_UNSAFE_CATEGORIES = frozenset(("Cc", "Cs", "Zl", "Zp"))


def clean_text(text: object, lines: bool = False) -> str:
    """The text with every character replaced that could act on a terminal or deceive its reader.

    With `lines`, line breaks and tabs are kept: for text that is shown as a block of its own.
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(c if c in kept or _is_safe(c) else REPLACEMENT for c in text)


def clip_text(text: object, width: int) -> str:
    """The cleaned text in `width` characters at most."""
    shown = clean_text(text)
    return shown if len(shown) <= width else shown[: width - 1] + "…"


def _is_safe(character: str) -> bool:
    unsafe = unicodedata.category(character) in _UNSAFE_CATEGORIES
    return not (unsafe or character in _BIDI_MARKS or character in _HIDDEN_MARKS)
