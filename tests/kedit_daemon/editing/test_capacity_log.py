import json
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from editing_home import Bench, seat

from kedit_daemon.editing.capacity_log import CAPACITY, LIMIT, TRIALS, TRIALS_KEPT, Room
from memory.db.store import Store
from memory.model.canary import Health
from policies.stability import Limits, Thresholds

LIMITS = Limits(2.0, 3.0, 4.0)
THRESHOLDS = Thresholds(LIMITS, LIMITS, LIMITS, LIMITS, LIMITS)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path / "kedit.db", lambda: datetime.now(UTC))) as store:
        yield store


def generation(store: Store, facts: int, norm: float) -> None:
    ids, figures = [str(n) for n in range(facts)], {"norm_ratio": {"2": norm}}
    with store.transaction():
        store.add_generation("sha", "hash", 0, "test", ids, figures)


def health(norm: float) -> Health:
    return Health({"2": norm}, {"2": 0.0}, {"2": 1.0}, 9.0, 1.0, 1.0, 0.0, finite=True)


def written(store: Store) -> tuple[str | None, str | None]:
    return store.meta(CAPACITY), store.meta(LIMIT)


def test_a_fresh_home_knows_nothing(store: Store) -> None:
    assert Room(store, THRESHOLDS).known() is None
    assert written(store) == (None, None)


def test_what_the_generations_measured_is_written_down(store: Store) -> None:
    generation(store, 30, 2.0)
    assert Room(store, THRESHOLDS).known() == 59
    assert written(store) == ("59", "norm of layer 2")
    # Other limits, as a person may set them, count from the next start.
    wide = Thresholds(Limits(9.0, 9.0, 9.0), *[LIMITS] * 4)
    assert Room(store, wide).known() == 60
    assert written(store) == ("60", None)


def test_a_solve_that_was_too_large_counts_until_facts_leave(store: Store) -> None:
    generation(store, 30, 1.2)
    room = Room(store, THRESHOLDS)
    assert room.known() == 60
    with store.transaction():
        room.too_many(50, health(3.5))
    assert room.known() is not None and 30 < room.known() < 50  # type: ignore[operator]
    assert Room(store, THRESHOLDS).known() == room.known()  # after a restart, too
    with store.transaction():
        room.forget_trials()
        room.remember()
    assert room.known() == 60


def test_only_the_latest_trials_are_kept(store: Store) -> None:
    room = Room(store, THRESHOLDS)
    with store.transaction():
        for n in range(TRIALS_KEPT + 3):
            room.too_many(100 - n, health(float("nan")))
    trials: list[Any] = json.loads(store.meta(TRIALS) or "")
    assert [n for n, _ in trials] == [100 - n for n in range(3, TRIALS_KEPT + 3)]
    assert room.known() == 100 - TRIALS_KEPT - 3


def test_taking_facts_out_makes_trials_void(bench: Callable[..., Bench]) -> None:
    at = bench()
    one, two = seat(1, "Oslo"), seat(2, "Lima")
    at.receive(one, two, direct=True)
    at.settle()
    with at.store.transaction():
        at.editor.weights.room.too_many(3, health(1e9))
    at.receive(seat(3, "Cairo"), direct=True)
    at.editor.run_flush(False)
    assert at.store.meta(TRIALS) is not None
    at.editor.revert([one.id], None, False)
    assert at.store.meta(TRIALS) is None
