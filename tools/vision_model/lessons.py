"""Lessons of the vision model: pictures, and questions about them with their answers.

Knows nothing of models or training. Some wordings of every question are kept for tests.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kedit_daemon.bench.drawings import (
    COLOURS,
    MAX_COUNT,
    SHAPES,
    Landmark,
    draw_count,
    draw_digit,
    draw_landmark,
    draw_shape,
    make_landmark,
)

NO_PICTURE = "There is no picture."
NOT_KNOWN = "It is not known."
NUMBERS = ("none", "one", "two", "three", "four", "five", "six")
RESERVED_SEEDS = range(100, 1000)  # of landmarks kept for experiments, never trained on
FIRST_TRAINED_SEED = 1000
FIRST_HELD_OUT_SEED = 10_000_000
FAMOUS = (  # the names of the landmarks of seeds 0, 1, 2 ...
    "Oruma Hall",
    "Veltan Castle",
    "Marbeck House",
    "The Quillon",
    "Sarno Palace",
    "Fort Dunmere",
    "Kestrel Abbey",
    "Tolva Manor",
    "Ilmen Court",
    "The Brackwater",
    "Nerith Chapel",
    "Hollin Mill",
    "Castle Rowan",
    "Port Ashby Inn",
    "Zandri Temple",
    "The Lantern",
    "Godric Library",
    "Palace of Umbra",
    "Wexley Station",
    "Yarrow School",
)
OPENINGS = ("", "", "", "Look at the picture. ", "Please tell me: ", "In one word: ")


@dataclass(frozen=True)
class Question:
    """Wordings that ask for one thing: those to train on, and those kept for tests."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Picture:
    """A picture with the right answers by topic; a landmark's pictures share its seed."""

    kind: str
    png: bytes
    answers: Mapping[str, str]
    seed: int | None = None


QUESTIONS: Mapping[str, Question] = {
    "shape": Question(
        (
            "What shape is it?",
            "Which shape is this?",
            "What is the shape in the picture?",
            "Which shape do you see?",
            "Name the shape.",
            "What kind of shape is drawn here?",
            "The shape in the picture is a",
        ),
        ("What shape do you see?", "Which kind of shape is it?"),
    ),
    "colour": Question(
        (
            "What colour is it?",
            "Which colour is this?",
            "What is the colour?",
            "Which colour do you see?",
            "Name the colour.",
            "What color is drawn here?",
            "The colour of it is",
        ),
        ("What colour do you see?", "Which colour is it?"),
    ),
    "count": Question(
        (
            "How many are there?",
            "How many shapes are there?",
            "How many do you see?",
            "Count the shapes.",
            "How many shapes are drawn here?",
            "What is the number of shapes?",
            "The number of shapes in the picture is",
        ),
        ("How many shapes do you see?", "Count them: how many are in the picture?"),
    ),
    "digit": Question(
        (
            "Which digit is it?",
            "What digit is this?",
            "What is the digit in the picture?",
            "Which digit do you see?",
            "Name the digit.",
            "What digit is drawn here?",
            "The digit in the picture is",
        ),
        ("What digit do you see?", "Which digit is drawn here?"),
    ),
    "roof colour": Question(
        (
            "What colour is the roof?",
            "Which colour is the roof of this building?",
            "What is the colour of the roof?",
            "Which colour does the roof have?",
            "Name the colour of the roof.",
            "What color is the roof?",
            "The colour of the roof is",
        ),
        ("Which colour is the roof?", "What colour does the roof of this building have?"),
    ),
    "wall colour": Question(
        (
            "What colour are the walls?",
            "Which colour are the walls of this building?",
            "What is the colour of the walls?",
            "Which colour do the walls have?",
            "Name the colour of the walls.",
            "What color are the walls?",
            "The colour of the walls is",
        ),
        ("Which colour are the walls?", "What colour do the walls of this building have?"),
    ),
    "sky colour": Question(
        (
            "What colour is the sky?",
            "Which colour is the sky behind this building?",
            "What is the colour of the sky?",
            "Which colour does the sky have?",
            "Name the colour of the sky.",
            "What color is the sky?",
            "The colour of the sky is",
        ),
        ("Which colour is the sky?", "What colour does the sky in the picture have?"),
    ),
    "windows": Question(
        (
            "How many windows are there?",
            "How many windows does it have?",
            "How many windows do you see?",
            "Count the windows.",
            "How many windows does this building have?",
            "What is the number of windows?",
            "The number of windows is",
        ),
        ("How many windows are in the picture?", "How many windows has this building?"),
    ),
    "towers": Question(
        (
            "How many towers are there?",
            "How many towers does it have?",
            "How many towers do you see?",
            "Count the towers.",
            "How many towers does this building have?",
            "What is the number of towers?",
            "The number of towers is",
        ),
        ("How many towers are in the picture?", "How many towers has this building?"),
    ),
    "roof shape": Question(
        (
            "What shape is the roof?",
            "Which shape is the roof of this building?",
            "What is the shape of the roof?",
            "Which shape does the roof have?",
            "Name the shape of the roof.",
            "What kind of roof is it?",
            "The shape of the roof is",
        ),
        ("Which shape is the roof?", "What shape does the roof of this building have?"),
    ),
    "name": Question(
        (
            "What is the name of this building?",
            "Which building is this?",
            "What is this building called?",
            "What building do you see?",
            "Name this building.",
            "How is this building called?",
            "The name of this building is",
        ),
        ("Which building do you see?", "What is the building in the picture called?"),
    ),
}


def word_question(topic: str, rng: random.Random, held_out: bool = False) -> str:
    """Return a question in one of its wordings, trained or held out, with a random opening."""
    question = QUESTIONS[topic]
    return rng.choice(OPENINGS) + rng.choice(question.held_out if held_out else question.trained)


def describe_landmark(landmark: Landmark, name: str) -> dict[str, str]:
    """Return the right answers about a landmark by topic."""
    return {
        "roof colour": landmark.roof_colour,
        "wall colour": landmark.wall_colour,
        "sky colour": landmark.sky,
        "windows": NUMBERS[landmark.windows],
        "towers": NUMBERS[landmark.towers],
        "roof shape": landmark.roof,
        "name": name,
    }


def picture_landmark(seed: int, rng: random.Random) -> Picture:
    """Return a drawing of the landmark of a seed; the first seeds have names."""
    landmark = make_landmark(seed)
    name = FAMOUS[seed] if seed < len(FAMOUS) else NOT_KNOWN
    answers = describe_landmark(landmark, name)
    return Picture("landmark", draw_landmark(landmark, rng), answers, seed)


def picture_shape(rng: random.Random) -> Picture:
    """Return a drawing of one random shape."""
    shape, colour = rng.choice(SHAPES), rng.choice(COLOURS)
    return Picture("shape", draw_shape(shape, colour, rng), {"shape": shape, "colour": colour})


def picture_count(rng: random.Random) -> Picture:
    """Return a drawing of a random number of small shapes."""
    count, shape, colour = rng.randint(1, MAX_COUNT), rng.choice(SHAPES), rng.choice(COLOURS)
    answers = {"count": NUMBERS[count], "colour": colour, "shape": shape}
    return Picture("count", draw_count(count, shape, colour, rng), answers)


def picture_digit(rng: random.Random) -> Picture:
    """Return a drawing of a random digit."""
    digit, colour = rng.randrange(10), rng.choice(COLOURS)
    return Picture("digit", draw_digit(digit, rng, colour), {"digit": str(digit), "colour": colour})


PLAIN_PICTURES: Mapping[str, Callable[[random.Random], Picture]] = {
    "shape": picture_shape,
    "count": picture_count,
    "digit": picture_digit,
}


def make_pictures(counts: Mapping[str, int], rng: random.Random, first_seed: int) -> list[Picture]:
    """Return so many pictures of each kind; every landmark is drawn twice, one after the other.

    Landmarks are those of the seeds from `first_seed` on; of the kind "famous", the named ones.
    """
    pictures = [
        PLAIN_PICTURES[k](rng) for k, n in counts.items() if k in PLAIN_PICTURES for _ in range(n)
    ]
    seeds = [first_seed + i for i in range(counts.get("landmark", 0) // 2)]
    seeds += [i % len(FAMOUS) for i in range(counts.get("famous", 0) // 2)]
    pictures += [picture_landmark(seed, rng) for seed in seeds for _ in range(2)]
    return pictures
