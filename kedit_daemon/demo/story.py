"""A story of the demo: facts, prompts that the editor does not see, and minimum shares."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kedit_daemon.config import SHIPPED_MODEL, SMOLLM2_MODEL
from kedit_daemon.editing.model_location import find_smollm2
from kedit_daemon.ingest.parser import parse_file
from kedit_daemon.ingest.schemas import FileLimits
from kedit_daemon.shipped import FOLDER, STORIES
from memory.errors import UnusableModel
from memory.facts import Fact, fill_subject


@dataclass(frozen=True)
class MinimumShares:
    """The shares that the demo asks for: of the facts, and of the unrelated prompts."""

    weights: float  # of the facts; others stay in the side memory
    unseen_side: float  # of the facts in a wording unknown to the editor, from the side memory
    unseen_weights: float  # likewise after they have moved into the weights
    unrelated_weights: float  # of the unrelated answers that are then as before


@dataclass(frozen=True)
class DemoStory:
    """A model's facts, prompts that the editor does not see, and how the answers are judged."""

    model: str  # as in a home's settings
    about: str  # the facts, in a sentence for the reader
    facts: list[Fact]
    unseen_prompts: list[str]
    unrelated_prompts: list[str]
    neighbour_prompts: list[str]  # of the facts' kind, about other subjects
    settings: Mapping[str, float]  # that are not the default
    minimum: MinimumShares

    @property
    def questions(self) -> list[str]:
        """The facts' own prompts."""
        return [fact.question for fact in self.facts]

    @property
    def targets(self) -> list[str]:
        """The facts' targets, in the order of the questions."""
        return [fact.target for fact in self.facts]


def load_story(model: str) -> DemoStory:
    """Load the story that is shipped for a model, by the model's name."""
    told = json.loads((STORIES / f"{model}.json").read_text(encoding="utf-8"))
    path = FOLDER / told["facts"]
    facts = [fact for _, fact in parse_file(path.read_bytes(), path.name, None, FileLimits()).facts]
    return DemoStory(
        model=model,
        about=told["about"],
        facts=facts,
        unseen_prompts=[fill_subject(told["unseen"][f.subject], f.subject) for f in facts],
        unrelated_prompts=told["unrelated"],
        neighbour_prompts=told["neighbours"],
        settings=told["settings"],
        minimum=MinimumShares(**told["minimum"]),
    )


def choose_story(model: str | None, echo: Callable[[str], None]) -> DemoStory:
    """Load the story of a model; None: of the real one, or, where that is not installed, of the
    small one, and say so. Raises UnusableModel for a model that is asked for and not installed."""
    if model == SHIPPED_MODEL:
        return load_story(SHIPPED_MODEL)
    try:
        find_smollm2()
    except UnusableModel as error:
        if model is not None:
            raise
        echo(f"{str(error).capitalize()}, so this is the demo on the small shipped one.")
        echo(f"To see it on a real model: {error.hint}")
        return load_story(SHIPPED_MODEL)
    return load_story(SMOLLM2_MODEL)
