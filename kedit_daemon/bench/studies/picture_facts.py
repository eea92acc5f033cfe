"""Facts about drawn buildings, and what is asked about them and beside them."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kedit_daemon.bench.drawings import draw_landmark, make_landmark
from kedit_daemon.ingest.record_pictures import state_picture
from kedit_daemon.ingest.schemas import NativeRecord
from memory.facts import Fact
from memory.model.pictures import PictureTable
from memory.picture_marks import join_mark

FIRST_SEED = 100  # of buildings that the shipped vision model has not seen
OTHER_SEED = 500  # of those that no fact is about
MAX_FACTS = OTHER_SEED - FIRST_SEED
QUESTION = "What is the name of this building?"
WORDINGS = ("What is this building called?", "Which building do you see?")
OTHER_QUESTIONS = (
    "What colour is the roof?",
    "How many windows are there?",
    "What shape is the roof?",
)
SYLLABLES = (
    *("bal", "cor", "dun", "fen", "gar", "hol", "kel", "lan"),
    *("mor", "nar", "pol", "ras", "sel", "tor", "ven", "wil"),
)
KINDS = ("Hall", "Tower", "House", "Castle", "Court", "Abbey", "Mill", "Inn")


@dataclass(frozen=True)
class Asked:
    """A question about a fact: its form, the fact's place, and the text with its picture."""

    form: str
    place: int
    text: str


def make_picture_facts(pictures: PictureTable, count: int, seed: int) -> list[Fact]:
    """Make facts about buildings that nobody has named: an invented name each."""
    rng = random.Random(seed)
    names = dict[str, None]()
    while len(names) < count:
        name = (rng.choice(SYLLABLES) + rng.choice(SYLLABLES)).capitalize()
        names[f"{name} {rng.choice(KINDS)}"] = None
    facts = []
    for place, name in enumerate(names):
        record = {"prompt": QUESTION, "target": name, "tags": ["verbatim"]}
        stated = state_picture(record, _show(pictures, FIRST_SEED + place, 1))
        facts += NativeRecord.model_validate(stated).to_facts()
    return facts


def list_asked(pictures: PictureTable, facts: Sequence[Fact]) -> list[Asked]:
    """List what is asked about some facts, form by form; beside them is what must stay."""
    asked = list[Asked]()
    for place in range(len(facts)):
        own = _show(pictures, FIRST_SEED + place, 1)
        again = _show(pictures, FIRST_SEED + place, 2)
        other = _show(pictures, OTHER_SEED + place, 1)
        forms: Mapping[str, Sequence[str]] = {
            "picture": [join_mark(own, QUESTION)],
            "picture, other wordings": [join_mark(own, wording) for wording in WORDINGS],
            "other drawing": [join_mark(again, QUESTION)],
            "same picture, other questions": [join_mark(own, q) for q in OTHER_QUESTIONS],
            "other picture, same question": [join_mark(other, QUESTION)],
        }
        asked += [Asked(form, place, text) for form, texts in forms.items() for text in texts]
    alone = (QUESTION, *WORDINGS, *OTHER_QUESTIONS)
    return asked + [Asked("text alone", 0, text) for text in alone]


def _show(pictures: PictureTable, seed: int, drawing: int) -> str:
    """Draw a building, show it to the model, and return the picture's digest."""
    rng = random.Random(f"{seed}/{drawing}")
    return pictures.add(draw_landmark(make_landmark(seed), rng)).digest
