"""When the regular jobs are due. APScheduler's threads put a name on a queue; the edit loop takes
it and does the work.

APScheduler coalesces the runs that its own thread has missed. It cannot tell, without a pickled
job store, what was missed while no daemon ran, and it does not notice that the clock was set.
"""

import logging
import queue
import threading
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime, timedelta

from apscheduler.events import EVENT_JOB_MAX_INSTANCES, EVENT_JOB_SUBMITTED, JobSubmissionEvent
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.cron import CronTrigger

from memory.timestamps import format_utc

CLOCK_JUMP_SECONDS = 60.0
_ONE_MICROSECOND = timedelta(microseconds=1)
_log = logging.getLogger(__name__)


def _do_nothing() -> None:
    """Stand for the job in the scheduler: its name is on the queue as soon as it is submitted."""


class JobSchedule:
    """Hands out (job name, planned time) on `due_jobs`; a job that already waits there waits once.

    Every planned time is handed out once, alone or with others that were missed like it. It is
    not handed out again when the clock was set back and reaches it a second time.
    """

    def __init__(
        self,
        schedule: Mapping[str, str],
        clock: Callable[[], datetime],
        monotonic: Callable[[], float],
    ) -> None:
        self.due_jobs: queue.Queue[tuple[str, str]] = queue.Queue()
        self._enqueue_lock = threading.Lock()  # between the scheduler's thread and ours
        self._covered_until: dict[str, datetime] = {}  # planned times up to here are handed out
        self._clock, self._monotonic = clock, monotonic
        crontab = CronTrigger.from_crontab
        self._triggers = {name: crontab(cron, timezone=UTC) for name, cron in schedule.items()}
        self._scheduler = BackgroundScheduler(
            timezone=UTC,
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
        )
        # What the scheduler leaves out, because its own thread is behind, is due all the same.
        events = EVENT_JOB_SUBMITTED | EVENT_JOB_MAX_INSTANCES
        self._scheduler.add_listener(self._on_submitted, events)
        self._last_wall_time, self._last_monotonic = clock(), monotonic()

    def start(self, last_success: Mapping[str, str | None]) -> None:
        """Start the threads. A job without a success, or one that was planned since, is due now.

        last_success: by job, when the last run that succeeded began.
        """
        now = self._last_wall_time = self._clock()
        self._last_monotonic = self._monotonic()
        for name, trigger in self._triggers.items():
            self._enqueue_missed(name, last_success.get(name), now)
            following = self._find_next_time(name, now)
            self._scheduler.add_job(_do_nothing, trigger, id=name, next_run_time=following)
        self._scheduler.start()

    def stop(self) -> None:
        """Stop the scheduler's threads; the queue keeps what is on it."""
        if self._scheduler.running:
            self._scheduler.shutdown()

    def take_due_job(self, postponed: Collection[str] = ()) -> tuple[str, str] | None:
        """Take the first due job that is not `postponed` off the queue: its name and planned time;
        None if there is none."""
        with self.due_jobs.mutex:
            found = next((job for job in self.due_jobs.queue if job[0] not in postponed), None)
            if found is not None:
                self.due_jobs.queue.remove(found)
        return found

    def check_clock(self) -> float | None:
        """Return the seconds by which the clock has jumped since the last call, or None.

        Call it often. After a jump every job is planned from the clock as it is now; otherwise one
        that was set back would stop the jobs until it has caught up. What a jump forward (or a
        sleep of the machine) has skipped is due once; also when the monotonic clock ran on
        meanwhile, which the scheduler's thread does not notice.
        """
        wall, steady = self._clock(), self._monotonic()
        jump = (wall - self._last_wall_time).total_seconds() - (steady - self._last_monotonic)
        self._last_wall_time, self._last_monotonic = wall, steady
        jumped = abs(jump) > CLOCK_JUMP_SECONDS
        if jumped:
            _log.warning("The clock jumped by %.0f s; rescheduling every job.", jump)
        for job in self._scheduler.get_jobs():
            late = (wall - job.next_run_time).total_seconds()
            if jumped or late > CLOCK_JUMP_SECONDS:
                if late >= 0:
                    self._enqueue_job(job.id, job.next_run_time, wall)
                job.modify(next_run_time=self._find_next_time(job.id, wall))
        return jump if jumped else None

    def _enqueue_missed(self, name: str, last: str | None, now: datetime) -> None:
        if last is None:
            self._enqueue_job(name, now, now)
            return
        began = self._covered_until[name] = datetime.fromisoformat(last)
        missed = self._triggers[name].get_next_fire_time(None, began + _ONE_MICROSECOND)
        if missed <= now:
            self._enqueue_job(name, missed, now)

    def _find_next_time(self, name: str, now: datetime) -> datetime:
        """Return the next planned time that is not handed out yet.

        After the clock was set back by more than the job's period that would be too far off: the
        job is then planned from the clock as it is.
        """
        trigger = self._triggers[name]
        with self._enqueue_lock:
            covered = self._covered_until.get(name, now)
            after: datetime = trigger.get_next_fire_time(None, max(covered, now) + _ONE_MICROSECOND)
            if covered - now > after - covered:
                self._covered_until[name] = now
                after = trigger.get_next_fire_time(None, now + _ONE_MICROSECOND)
        return after

    def _on_submitted(self, event: JobSubmissionEvent) -> None:
        planned = event.scheduled_run_times[-1]
        self._enqueue_job(event.job_id, planned, planned)

    def _enqueue_job(self, name: str, planned: datetime, covers: datetime) -> None:
        """Hand out a planned time, and with it all up to `covers`.

        The edit loop may be busy for longer than a period: the job is then due once.
        """
        with self._enqueue_lock:
            if name in self._covered_until and planned <= self._covered_until[name]:
                return
            self._covered_until[name] = covers
            with self.due_jobs.mutex:
                waits = any(name == waiting for waiting, _ in self.due_jobs.queue)
            if not waits:
                self.due_jobs.put((name, format_utc(planned, "seconds")))
