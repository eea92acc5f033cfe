"""Whether a text names a subject: the same words, whatever their case and punctuation."""

import unicodedata


def plain(text: str) -> str:
    """Letters and digits of one case and width, single spaces for all else."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join("".join(c if c.isalnum() else " " for c in folded).split())


def names(text: str, subject: str) -> bool:
    """Whether a plain text has the plain subject in it as whole words. An empty one is in none.

    Scripts without capitals may write words without a space between, so that a word's end cannot
    be seen there: in those the letters are enough.
    """
    at = text.find(subject) if subject else -1
    while at >= 0:
        end = at + len(subject)
        if _apart(text[max(at - 1, 0) : at + 1]) and _apart(text[end - 1 : end + 1]):
            return True
        at = text.find(subject, at + 1)
    return False


def _apart(pair: str) -> bool:
    """Whether two characters side by side may belong to two words; one alone stands at an edge."""
    return len(pair) < 2 or not all(c.isdigit() or c.upper() != c.lower() for c in pair)
