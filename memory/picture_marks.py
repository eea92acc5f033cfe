"""Marks of pictures, by which a text says that one stands at a place: they have its digest.

A mark is plain text, so that facts, prompts, conversations and logs may hold one. Whoever encodes a
text for a model puts the picture's tokens in the mark's place.
"""

import hashlib
import re

FIRST_PICTURE_ID = 1 << 24  # of a picture's tokens in a process: beyond every vocabulary
MARK = re.compile(r"\[image ([0-9a-f]{32})\]")


def make_digest(data: bytes) -> str:
    """Return the digest by which a picture's file is known: half a sha256, in hex."""
    return hashlib.sha256(data).hexdigest()[:32]


def make_mark(digest: str) -> str:
    """Write the mark of a picture."""
    return f"[image {digest}]"


def find_digest(text: str) -> str | None:
    """Return the digest of the first picture in a text."""
    found = MARK.search(text)
    return found[1] if found else None


def join_mark(digest: str, text: str) -> str:
    """Write a picture before a text; the blank between is none of the model's."""
    return f"{make_mark(digest)} {text}"


def remove_marks(text: str) -> str:
    """Return a text without its pictures."""
    return re.sub(rf"{MARK.pattern} ?", "", text)
