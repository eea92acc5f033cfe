"""When work is taken again that did not fit."""

import errno
import os
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest

from kedit_daemon.daemon import disk_pause
from kedit_daemon.daemon.disk_pause import MAX_RETRY_SECONDS, RETRY_SECONDS, DiskPause
from memory.db.store import Store


class Seconds:
    """A clock that only tests move."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path / "kedit.db", lambda: datetime.now(UTC))) as opened:
        yield opened


def events(store: Store) -> list[str]:
    return [kind for (kind,) in store.db.conn.execute("SELECT kind FROM events ORDER BY seq")]


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_does_not_fit_is_tried_more_and_more_seldom(store: Store, tmp_path: Path) -> None:
    clock = Seconds()
    paused, tries = DiskPause(store, tmp_path, clock), list[float]()
    while clock.now < 24 * 3600:
        if not paused.check_disk():
            tries.append(clock.now)
            paused.record_disk_full(full())
        clock.now += 20
    waits = [after - before for before, after in pairwise(tries)]
    assert waits[:3] == [RETRY_SECONDS, 2 * RETRY_SECONDS, 4 * RETRY_SECONDS]
    assert waits[-1] == max(waits) == MAX_RETRY_SECONDS
    assert events(store) == ["paused"] and paused.make_refusal() is not None
    clock.now += MAX_RETRY_SECONDS
    assert not paused.check_disk()
    assert paused.make_refusal() is not None  # nothing has been done yet
    paused.record_success()
    assert events(store) == ["paused", "resumed"] and paused.make_refusal() is None
    paused.record_disk_full(full())
    clock.now += RETRY_SECONDS  # from the start again
    assert not paused.check_disk()


def test_room_that_is_made_is_used_at_once(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = [1 << 30]
    monkeypatch.setattr(disk_pause, "measure_free_bytes", lambda _: room[0])
    paused = DiskPause(store, tmp_path, Seconds())
    paused.record_disk_full(full())
    assert paused.check_disk()
    room[0] *= 2
    assert not paused.check_disk()
