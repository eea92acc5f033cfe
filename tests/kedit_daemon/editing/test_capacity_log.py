import json
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from editing_home import Bench, seat

from kedit_daemon.editing.capacity_log import MAX_TRIALS, CapacityLog
from memory.db import meta_keys
from memory.db.store import Store
from memory.model.canary import Health
from policies.health_limits import Limits, Thresholds

LIMITS = Limits(2.0, 3.0, 4.0)
THRESHOLDS = Thresholds(LIMITS, LIMITS, LIMITS, LIMITS, LIMITS)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path / "kedit.db", lambda: datetime.now(UTC))) as store:
        yield store


def generation(store: Store, facts: int, norm: float) -> None:
    ids, figures = [str(n) for n in range(facts)], {"norm_ratio": {"2": norm}}
    with store.db.transaction():
        store.artifacts.add_generation("sha", "hash", 0, "test", ids, figures)


def health(norm: float) -> Health:
    return Health({"2": norm}, {"2": 0.0}, {"2": 1.0}, 9.0, 1.0, 1.0, 0.0, finite=True)


def written(store: Store) -> tuple[str | None, str | None]:
    return store.db.get_meta(meta_keys.WEIGHTS_CAPACITY), store.db.get_meta(meta_keys.WEIGHTS_LIMIT)


def test_a_fresh_home_knows_nothing(store: Store) -> None:
    assert CapacityLog(store, THRESHOLDS).read_capacity() is None
    assert written(store) == (None, None)


def test_what_the_generations_measured_is_written_down(store: Store) -> None:
    generation(store, 30, 2.0)
    assert CapacityLog(store, THRESHOLDS).read_capacity() == 59
    assert written(store) == ("59", "norm of layer 2")
    # Other limits, as a person may set them, count from the next start.
    wide = Thresholds(Limits(9.0, 9.0, 9.0), *[LIMITS] * 4)
    assert CapacityLog(store, wide).read_capacity() == 60
    assert written(store) == ("60", None)


def test_a_solve_that_was_too_large_counts_until_facts_leave(store: Store) -> None:
    generation(store, 30, 1.2)
    room = CapacityLog(store, THRESHOLDS)
    assert room.read_capacity() == 60
    with store.db.transaction():
        room.record_oversized(50, health(3.5))
    assert room.read_capacity() is not None and 30 < room.read_capacity() < 50  # type: ignore[operator]
    assert (
        CapacityLog(store, THRESHOLDS).read_capacity() == room.read_capacity()
    )  # after a restart, too
    with store.db.transaction():
        room.forget_trials()
        room.record_capacity()
    assert room.read_capacity() == 60


def test_only_the_latest_trials_are_kept(store: Store) -> None:
    room = CapacityLog(store, THRESHOLDS)
    with store.db.transaction():
        for n in range(MAX_TRIALS + 3):
            room.record_oversized(100 - n, health(float("nan")))
    trials: list[Any] = json.loads(store.db.get_meta(meta_keys.WEIGHTS_TRIALS) or "")
    assert [n for n, _ in trials] == [100 - n for n in range(3, MAX_TRIALS + 3)]
    assert room.read_capacity() == 100 - MAX_TRIALS - 3


def test_taking_facts_out_makes_trials_void(bench: Callable[..., Bench]) -> None:
    at = bench()
    one, two = seat(1, "Oslo"), seat(2, "Lima")
    at.receive(one, two, direct=True)
    at.settle()
    with at.store.db.transaction():
        at.editor.generations.capacity_log.record_oversized(3, health(1e9))
    at.receive(seat(3, "Cairo"), direct=True)
    at.editor.run_flush(False)
    assert at.store.db.get_meta(meta_keys.WEIGHTS_TRIALS) is not None
    at.editor.revert([one.id], None, False)
    assert at.store.db.get_meta(meta_keys.WEIGHTS_TRIALS) is None
