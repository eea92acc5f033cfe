"""Tells names of files that are still being written, or that programs leave behind."""

from collections.abc import Sequence
from fnmatch import fnmatchcase


def is_unfinished(name: str, patterns: Sequence[str]) -> bool:
    """Check that a name is hidden, or matches one of the patterns in any case."""
    lower = name.lower()
    return name.startswith(".") or any(fnmatchcase(lower, p.lower()) for p in patterns)
