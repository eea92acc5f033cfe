"""The regular jobs: says when one is due, and never runs one.

The scheduler's threads put names on a queue; the edit loop takes them and does the work.
"""

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta

from apscheduler.events import (
    EVENT_JOB_MAX_INSTANCES,
    EVENT_JOB_SUBMITTED,
    JobSubmissionEvent,
)
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.cron import CronTrigger

JUMP_SECONDS = 60.0
_MOMENT = timedelta(microseconds=1)
_log = logging.getLogger(__name__)


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _nothing() -> None:
    """What the scheduler itself runs: the name is on the queue as soon as it is submitted."""


class Jobs:
    """Hands out (job name, planned time) on `due`; a job that already waits there waits once.

    Every planned time is handed out once, alone or with others that were missed like it. It is
    not handed out again where the clock was set back and comes by it a second time.
    """

    def __init__(
        self,
        schedule: Mapping[str, str],
        clock: Callable[[], datetime],
        monotonic: Callable[[], float],
    ) -> None:
        self.due: queue.Queue[tuple[str, str]] = queue.Queue()
        self._putting = threading.Lock()  # the scheduler's thread and guard() may meet
        self._covered: dict[str, datetime] = {}  # planned times up to here are handed out
        self._clock = clock
        self._monotonic = monotonic
        self._triggers = {
            name: CronTrigger.from_crontab(cron, timezone=UTC) for name, cron in schedule.items()
        }
        self._scheduler = BackgroundScheduler(
            timezone=UTC,
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
        )
        # What the scheduler leaves out, because its own thread is behind, is due all the same.
        both = EVENT_JOB_SUBMITTED | EVENT_JOB_MAX_INSTANCES
        self._scheduler.add_listener(self._submitted, both)
        self._wall, self._steady = clock(), monotonic()

    def start(self, last_success: Mapping[str, str | None]) -> None:
        """Begin. `last_success`: when the last run that ended well began, by job.

        A job that has none, or was planned since then, is due now.
        """
        now = self._wall = self._clock()
        self._steady = self._monotonic()
        for name, trigger in self._triggers.items():
            self._catch_up(name, last_success.get(name), now)
            self._scheduler.add_job(_nothing, trigger, id=name, next_run_time=self._next(name, now))
        self._scheduler.start()

    def stop(self) -> None:
        """End the scheduler's threads; what is on the queue stays there."""
        if self._scheduler.running:
            self._scheduler.shutdown()

    def guard(self) -> float | None:
        """To be called often: the seconds that the clock has jumped since the last call, if it has.

        After a jump every job is planned anew from the clock as it is now. Otherwise a clock that
        was set back would stop the jobs until it has caught up. What a jump forward (or a sleep of
        the machine) has skipped is due once; also where the steady clock ran on meanwhile, which
        the scheduler's thread does not hear of.
        """
        wall, steady = self._clock(), self._monotonic()
        jump = (wall - self._wall).total_seconds() - (steady - self._steady)
        self._wall, self._steady = wall, steady
        jumped = abs(jump) > JUMP_SECONDS
        if jumped:
            _log.warning("the clock jumped by %.0f s: every job is planned anew", jump)
        for job in self._scheduler.get_jobs():
            late = (wall - job.next_run_time).total_seconds()
            if jumped or late > JUMP_SECONDS:
                if late >= 0:
                    self._put(job.id, job.next_run_time, wall)
                job.modify(next_run_time=self._next(job.id, wall))
        return jump if jumped else None

    def next_runs(self) -> dict[str, str]:
        """Job name -> when it is due next."""
        return {job.id: _text(job.next_run_time) for job in self._scheduler.get_jobs()}

    def _catch_up(self, name: str, last: str | None, now: datetime) -> None:
        if last is None:
            self._put(name, now, now)
            return
        began = self._covered[name] = datetime.fromisoformat(last)
        missed = self._triggers[name].get_next_fire_time(None, began + _MOMENT)
        if missed <= now:
            self._put(name, missed, now)

    def _next(self, name: str, now: datetime) -> datetime:
        """The next planned time that is not handed out yet.

        Where the clock has been set back by more than the job's period, that would be too far off:
        the job is then planned from the clock as it is.
        """
        trigger = self._triggers[name]
        with self._putting:
            covered = self._covered.get(name, now)
            after: datetime = trigger.get_next_fire_time(None, max(covered, now) + _MOMENT)
            if covered - now > after - covered:
                self._covered[name] = now
                after = trigger.get_next_fire_time(None, now + _MOMENT)
        return after

    def _submitted(self, event: JobSubmissionEvent) -> None:
        planned = event.scheduled_run_times[-1]
        self._put(event.job_id, planned, planned)

    def _put(self, name: str, planned: datetime, covers: datetime) -> None:
        """Hand out a planned time, and with it all up to `covers`.

        The edit loop may be busy for longer than a period: the job is then due once, not often.
        """
        with self._putting:
            if name in self._covered and planned <= self._covered[name]:
                return
            self._covered[name] = covers
            with self.due.mutex:
                waits = any(name == waiting for waiting, _ in self.due.queue)
            if not waits:
                self.due.put((name, _text(planned)))
