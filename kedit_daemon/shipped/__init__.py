"""The shipped model and texts, by path and by line."""

from importlib.util import find_spec
from pathlib import Path

from memory.errors import KeditError

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"
VISION_MODEL = FOLDER / "vision"  # takes pictures, too
KNOWN_MODELS = FOLDER / "known"  # measurements of models that are not shipped, by their weights
PILOT_FACTS = FOLDER / "facts.jsonl"
STORIES = FOLDER / "stories"  # of the demo, one for each of two models
# Ours, and those under a licence of their own.
RELATIONS = FOLDER / "asking" / "relations.jsonl", FOLDER / "asking" / "pararel.jsonl"
RELATION_ENCODER = FOLDER / "asking" / "encoder.safetensors"


def read_ordinary_lines() -> list[str]:
    """Read the lines of ordinary text: for the canary, and for statistics of other models."""
    return (FOLDER / "ordinary.txt").read_text(encoding="utf-8").splitlines()


def read_names() -> list[str]:
    """Read names of people, places, companies, works and things: for the covariance of keys of
    models that bring none."""
    return (FOLDER / "names.txt").read_text(encoding="utf-8").splitlines()


def read_statements() -> list[str]:
    """Read the statements that lack their last word: for the canary's agreement with the base."""
    return (FOLDER / "statements.txt").read_text(encoding="utf-8").splitlines()


def locate_word_vectors() -> tuple[Path, Path]:
    """Return the paths of the word vectors of the package wordllama, and of their tokenizer; it is
    not imported. Raises KeditError where it is not installed."""
    found = find_spec("wordllama")
    if found is None or not found.submodule_search_locations:
        raise KeditError(
            "the package wordllama is not installed, whose word vectors tell what a question asks",
            code="config",
            hint="pip install wordllama",
        )
    folder = Path(found.submodule_search_locations[0])
    tokenizer = folder / "tokenizers" / "l2_supercat_tokenizer_config.json"
    return folder / "weights" / "l2_supercat_256.safetensors", tokenizer
