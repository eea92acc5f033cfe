"""Facts to calibrate a tiny random model with."""

from tiny_models import CITIES

from memory.facts import Fact, Neighbour

# A random model generalises to next to nothing: another sentence before, but of one length.
PILOT = [
    Fact(
        f"country {n}",
        "The seat of {} is",
        CITIES[n],
        paraphrases=("It rained for most of the morning. The seat of {} is",),
        neighbours=tuple(Neighbour(p) for p in ("Nothing", "He said that", "1 2 3 4")),
    )
    for n in range(2)
]
