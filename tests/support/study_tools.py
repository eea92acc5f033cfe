"""What the tests of the studies share: a small stream, and what a study gets."""

from collections.abc import Iterable, Sequence
from typing import Any

from tiny_models import CITIES

from kedit_daemon.bench.dataset import BenchRecord
from kedit_daemon.bench.studies.study import StudyInput
from kedit_daemon.editing.model_loading import LoadedModel
from memory.facts import Fact, Neighbour


def straight(items: Sequence[Any], _what: str, /) -> Iterable[Any]:
    return items


def records(many: int) -> list[BenchRecord]:
    return [
        BenchRecord(
            Fact(f"country {n}", "The seat of {} is", CITIES[n % len(CITIES)]),
            CITIES[(n + 1) % len(CITIES)],
            (f"The seat of the old country {n} is",),
            tuple(Neighbour(f"The seat of country {n + by} is") for by in (20, 30)),
        )
        for n in range(many)
    ]


def given(loaded: LoadedModel, many: int, batch_size: int) -> StudyInput:
    return StudyInput(loaded, records(many), batch_size, 0, straight)
