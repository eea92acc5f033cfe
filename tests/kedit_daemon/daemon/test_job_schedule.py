"""When a job is due: by plan, after a pause, and when the clock jumps."""

import queue
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta, tzinfo

import apscheduler.schedulers.base
import apscheduler.triggers.cron
import pytest
from apscheduler.events import EVENT_JOB_MAX_INSTANCES, EVENT_JOB_SUBMITTED, JobSubmissionEvent

from kedit_daemon.daemon.job_schedule import JobSchedule
from memory.timestamps import format_utc

HOUR = timedelta(hours=1)
NOON = datetime(2026, 3, 2, 12, 15, tzinfo=UTC)  # a Monday


class Clock:
    """A wall clock that can be set, beside a steady one that runs on by itself."""

    def __init__(self, wall: datetime) -> None:
        self.wall = wall
        self.steady = 1000.0

    def set(self, by: timedelta) -> None:
        self.wall += by

    def pass_(self, seconds: float) -> None:
        self.wall += timedelta(seconds=seconds)
        self.steady += seconds

    def jobs(self, schedule: dict[str, str]) -> JobSchedule:
        return JobSchedule(schedule, lambda: self.wall, lambda: self.steady)


@contextmanager
def running(jobs: JobSchedule, last: dict[str, str | None]) -> Iterator[JobSchedule]:
    jobs.start(last)
    try:
        yield jobs
    finally:
        jobs.stop()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock, which the scheduler library reads too."""
    clock = Clock(NOON)

    class Now(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Now":
            return cls.fromtimestamp(clock.wall.timestamp(), tz)

    monkeypatch.setattr(apscheduler.schedulers.base, "datetime", Now)
    return clock


def taken(jobs: JobSchedule) -> list[tuple[str, str]]:
    found = []
    while not jobs.due_jobs.empty():
        found.append(jobs.due_jobs.get_nowait())
    return found


def next_runs(jobs: JobSchedule) -> dict[str, str]:
    return {job.id: format_utc(job.next_run_time, "seconds") for job in jobs._scheduler.get_jobs()}


@pytest.mark.parametrize(
    ("cron", "last", "planned"),
    [
        ("0 * * * *", None, "2026-03-02T12:15:00Z"),
        ("0 * * * *", "2026-03-02T12:00:03Z", None),
        ("0 * * * *", "2026-03-02T11:45:00Z", "2026-03-02T12:00:00Z"),
        ("0 12 * * *", "2026-03-01T12:20:00Z", "2026-03-02T12:00:00Z"),  # it ran late yesterday
        ("0 * * * *", "2026-03-02T10:00:03Z", "2026-03-02T11:00:00Z"),
        ("0 4 * * *", "2026-03-02T04:00:09Z", None),
        ("0 4 * * *", "2026-02-28T04:00:09.5+00:00", "2026-03-01T04:00:00Z"),
        ("0 14 * * mon-fri", "2026-02-27T14:00:09Z", None),  # no day was left out: it was a weekend
        ("0 4 * * *", "2026-04-01T00:00:00Z", None),  # the clock was once ahead
    ],
)
def test_at_the_start_a_job_that_was_missed_is_due(
    clock: Clock, cron: str, last: str | None, planned: str | None
) -> None:
    with running(clock.jobs({"audit": cron}), {"audit": last}) as jobs:
        assert taken(jobs) == ([("audit", planned)] if planned else [])


def test_a_job_without_any_record_is_due(clock: Clock) -> None:
    with running(clock.jobs({"audit": "0 * * * *"}), {}) as jobs:
        assert taken(jobs) == [("audit", "2026-03-02T12:15:00Z")]


def test_every_job_is_planned_from_its_own_expression(clock: Clock) -> None:
    schedule = {"audit": "0 * * * *", "consolidate": "0 4 * * *"}
    jobs = clock.jobs(schedule)
    assert next_runs(jobs) == {}
    with running(jobs, {}):
        assert next_runs(jobs) == {
            "audit": "2026-03-02T13:00:00Z",
            "consolidate": "2026-03-03T04:00:00Z",
        }


def test_a_planned_job_comes_due_by_itself(clock: Clock) -> None:
    clock.wall = NOON.replace(minute=59, second=59, microsecond=900_000)
    last: dict[str, str | None] = {"audit": "2026-03-02T12:30:00Z"}
    with running(clock.jobs({"audit": "0 * * * *"}), last) as jobs:
        assert jobs.due_jobs.empty()
        clock.pass_(0.2)
        assert jobs.due_jobs.get(timeout=10) == ("audit", "2026-03-02T13:00:00Z")
        assert next_runs(jobs) == {"audit": "2026-03-02T14:00:00Z"}


def test_a_job_that_already_waits_is_not_queued_again(clock: Clock) -> None:
    clock.wall = NOON.replace(minute=59, second=59, microsecond=900_000)
    with running(clock.jobs({"audit": "0 * * * *"}), {}) as jobs:
        clock.pass_(0.2)
        deadline = time.monotonic() + 10
        while next_runs(jobs)["audit"] != "2026-03-02T14:00:00Z":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert taken(jobs) == [("audit", "2026-03-02T12:59:59Z")]


def test_an_even_clock_is_no_jump(clock: Clock) -> None:
    with running(clock.jobs({"audit": "0 * * * *"}), {"audit": "2026-03-02T12:14:00Z"}) as jobs:
        for _ in range(100):
            clock.pass_(600)
            clock.set(timedelta(seconds=1))  # as when the time is being adjusted slowly
            assert jobs.check_clock() is None


def test_a_clock_set_back_does_not_stop_the_jobs(clock: Clock) -> None:
    with running(clock.jobs({"audit": "0 * * * *"}), {"audit": "2026-03-02T12:14:00Z"}) as jobs:
        clock.pass_(1)
        clock.set(-5 * HOUR)
        assert jobs.check_clock() == pytest.approx(-5 * 3600)
        assert next_runs(jobs) == {"audit": "2026-03-02T08:00:00Z"}
        assert taken(jobs) == []
        assert jobs.check_clock() is None


def test_what_a_jump_forward_skipped_is_due_once(clock: Clock) -> None:
    schedule = {"audit": "0 * * * *", "consolidate": "0 4 * * *"}
    fresh: dict[str, str | None] = dict.fromkeys(schedule, "2026-03-02T12:14:00Z")
    with running(clock.jobs(schedule), fresh) as jobs:
        clock.set(5 * HOUR)
        assert jobs.check_clock() == pytest.approx(5 * 3600)
        assert taken(jobs) == [("audit", "2026-03-02T13:00:00Z")]
        assert next_runs(jobs)["audit"] == "2026-03-02T18:00:00Z"
        with pytest.raises(queue.Empty):
            jobs.due_jobs.get(timeout=0.2)


def test_what_the_guard_handed_out_is_not_due_again_when_the_thread_tells_late(
    clock: Clock,
) -> None:
    with running(clock.jobs({"audit": "0 * * * *"}), {"audit": "2026-03-02T12:14:00Z"}) as jobs:
        clock.set(5 * HOUR)
        jobs.check_clock()
        assert taken(jobs) == [("audit", "2026-03-02T13:00:00Z")]
        at = [NOON.replace(hour=hour, minute=0) for hour in (13, 17, 18)]
        for planned in at:
            event = JobSubmissionEvent(EVENT_JOB_SUBMITTED, "audit", "default", [planned])
            jobs._scheduler._dispatch_event(event)
        assert taken(jobs) == [("audit", "2026-03-02T18:00:00Z")]


def test_what_the_scheduler_leaves_out_because_it_is_behind_is_due(clock: Clock) -> None:
    with running(clock.jobs({"audit": "0 * * * *"}), {"audit": "2026-03-02T12:14:00Z"}) as jobs:
        planned = [NOON.replace(hour=13, minute=0)]
        event = JobSubmissionEvent(EVENT_JOB_MAX_INSTANCES, "audit", "default", planned)
        jobs._scheduler._dispatch_event(event)
        assert taken(jobs) == [("audit", "2026-03-02T13:00:00Z")]


def test_an_unstarted_one_can_be_stopped(clock: Clock) -> None:
    clock.jobs({"audit": "0 * * * *"}).stop()
