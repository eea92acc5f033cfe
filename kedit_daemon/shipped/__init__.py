"""The shipped model and texts, by path and by line."""

from pathlib import Path

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
KNOWN_MODELS = FOLDER / "known"  # measurements of models that are not shipped, by their weights
PILOT_FACTS = FOLDER / "facts.jsonl"
STORIES = FOLDER / "stories"  # of the demo, one for each of two models


def read_ordinary_lines() -> list[str]:
    """Read the lines of ordinary text: for the canary, and for statistics of other models."""
    return (FOLDER / "ordinary.txt").read_text(encoding="utf-8").splitlines()


def read_statements() -> list[str]:
    """Read the statements that lack their last word: for the canary's agreement with the base."""
    return (FOLDER / "statements.txt").read_text(encoding="utf-8").splitlines()
