"""White space of prompts and names, in order: as it is learned and as it is matched."""

import re

from memory.joins import join_texts

_WITHIN_LINE = re.compile(r"[^\S\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")
_SENTENCE_END = re.compile(r"[.?!:;…\u3002\uff1f\uff01\uff1a\uff1b]$")
_LISTED = re.compile(r"(?:[-*\u2022]|\w{1,2}[.)]) ")  # as in "1. …"
_LABELLED = re.compile(r"\w[\w ]{0,30}[:\uff1a]")  # as in "Q: …"


def settle_blanks(text: str) -> str:
    """Return a text without white space at its ends, with single blanks, and without line breaks
    within a sentence."""
    lines: list[str] = []
    for line in (_WITHIN_LINE.sub(" ", line).strip() for line in text.strip().splitlines()):
        if lines and _goes_on(lines[-1], line):
            lines[-1] = join_texts(lines[-1], line)
        else:
            lines.append(line)
    return "\n".join(lines)


def _goes_on(line: str, following: str) -> bool:
    """Check that a line ends within a sentence."""
    stands_apart = any(_LABELLED.match(part) or _LISTED.match(part) for part in (line, following))
    return bool(line and following and not _SENTENCE_END.search(line) and not stands_apart)
