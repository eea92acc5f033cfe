"""Whatever the clock does, each scheduled job runs once: none is lost, and no two run at a time."""

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, tzinfo
from itertools import pairwise
from pathlib import Path

import apscheduler.schedulers.base
import pytest
from editing_home import LOOSE, Bench, Clock

from kedit_daemon.config import Config, ScheduleConfig
from kedit_daemon.control import ControlRequest
from kedit_daemon.daemon import job_runner
from kedit_daemon.daemon.job_runner import run_job
from kedit_daemon.daemon.loop import WAKE_REQUEST, Daemon
from kedit_daemon.editing.editor import Editor
from kedit_daemon.editing.model_loading import LoadedModel, load_model
from kedit_daemon.report.render import render_status
from kedit_daemon.report.status import gather_status
from kedit_daemon.system.lock import hold_lock
from kedit_daemon.system.sd_notify import SystemdNotifier
from memory.errors import KeditError

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
MINUTE, SECOND = timedelta(minutes=1), timedelta(seconds=1)
NOON = datetime(2026, 3, 2, 12, 15, tzinfo=UTC)
JOBS = sorted(ScheduleConfig().model_dump())
# A planned time of each job, and the one after it; `expire` runs every minute.
SLOTS = {
    "audit": (NOON.replace(hour=13, minute=0), NOON.replace(hour=14, minute=0)),
    "consolidate": (NOON.replace(hour=4, minute=0), NOON.replace(day=3, hour=4, minute=0)),
    "retention": (NOON.replace(hour=2, minute=30), NOON.replace(day=3, hour=2, minute=30)),
}


class Machine:
    """A daemon in its loop, on a machine whose clocks a test moves."""

    def __init__(self, at: Bench, clock: Clock, works: bool) -> None:
        self.at, self.clock, self.steady = at, clock, 1000.0
        self.works = works  # whether the jobs do what they are for, which takes seconds
        self.during: Callable[[str], None] = lambda _name: None  # called while a job works
        self.begin()

    def begin(self) -> None:
        """Start a daemon on what the home holds."""
        at = self.at
        steady = lambda: self.steady  # noqa: E731
        self.daemon = Daemon(at.home, at.config, at.store, SystemdNotifier({}), self.clock, steady)
        self.daemon.editor = at.editor
        self.daemon.job_schedule.start({name: at.store.find_last_success(name) for name in JOBS})

    def run_job(self, editor: Editor, name: str) -> str:
        self.during(name)
        return run_job(editor, name) if self.works else "done"

    def crash(self) -> None:
        """What was only in memory is gone."""
        self.daemon.job_schedule.stop()
        self.at.restart()

    def set_clock(self, by: timedelta) -> None:
        """Somebody sets it, or the machine sleeps with both clocks."""
        self.clock.now += by

    def pass_time(self, by: timedelta) -> None:
        self.clock.now += by
        self.steady += by.total_seconds()

    def to(self, moment: datetime) -> None:
        """Time passes, the scheduler's thread wakes up, then the loop turns."""
        self.pass_time(moment - self.clock.now)
        self.thread_wakes()
        self.turn()

    def thread_wakes(self) -> None:
        self.daemon.job_schedule._scheduler._process_jobs()

    def turn(self) -> None:
        self.daemon.control_server.requests.put(
            ControlRequest(WAKE_REQUEST, {})
        )  # it need not wait
        self.daemon._run_turn()

    def rows(self) -> list[tuple[str, str, str | None]]:
        """Name, planned time and outcome of all runs so far."""
        sql = "SELECT name, scheduled_for, outcome FROM job_run ORDER BY id"
        return [tuple(row) for row in self.at.store.db.conn.execute(sql)]

    def ran(self, name: str, planned: datetime) -> int:
        """How often a job ran for a planned time."""
        return self.rows().count((name, text(planned), "ok"))

    def names(self, since: int) -> list[str]:
        return sorted(name for name, _, _ in self.rows()[since:])

    def status(self) -> dict[str, str | None]:
        """Each job's outcome, as `status` tells it."""
        jobs = gather_status(self.at.home, self.clock.now, {}, "kedit-daemon")["jobs"]
        return {name: job["outcome"] for name, job in jobs.items()}


def text(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


@pytest.fixture(scope="module")
def loaded(model_folder: Callable[[str], Path], statistics_cache: Path) -> LoadedModel:
    """One model for all: no test here edits it."""
    return load_model(str(model_folder("llama")), "cpu", statistics_cache, iter)


@pytest.fixture
def machine(
    tmp_path: Path, loaded: LoadedModel, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Machine]]:
    """Makes machines whose daemon has run every job once, where it is not said otherwise."""
    made: list[Machine] = []

    class Now(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Now":
            return cls.fromtimestamp(clock.now.timestamp(), tz)

    monkeypatch.setattr(apscheduler.schedulers.base, "datetime", Now)

    def make(now: datetime = NOON, turned: bool = True, works: bool = False) -> Machine:
        clock.now = now
        at = Bench(tmp_path / "home", loaded, clock, Config.model_validate(LOOSE))
        machine = Machine(at, clock, works)
        monkeypatch.setattr(job_runner, "run_job", machine.run_job)
        made.append(machine)
        if turned:
            machine.turn()
            assert machine.names(0) == JOBS
        return machine

    yield make
    for machine in made:
        machine.daemon.job_schedule.stop()
        machine.at.store.close()


@pytest.mark.parametrize("name", SLOTS)
@pytest.mark.parametrize("minutes", [-10, 59])
def test_the_clock_set_back_an_hour(
    machine: Callable[..., Machine], name: str, minutes: int
) -> None:
    slot, following = SLOTS[name]
    at = machine(slot - 30 * MINUTE)
    if minutes > 0:
        at.to(slot + SECOND)
    at.to(slot + minutes * MINUTE)
    at.set_clock(-HOUR)
    at.turn()
    assert at.names(len(JOBS)).count(name) == (minutes > 0)
    for moment in (slot + SECOND, slot + HOUR - MINUTE):
        at.to(moment)
        assert at.ran(name, slot) == 1
    at.to(following + SECOND)
    assert (at.ran(name, slot), at.ran(name, following)) == (1, 1)
    assert all(outcome == "ok" for _, _, outcome in at.rows())


def test_expiry_goes_on_every_minute_after_the_clock_was_set_back(
    machine: Callable[..., Machine],
) -> None:
    at = machine()
    at.set_clock(-HOUR)
    at.turn()
    assert at.names(4) == []
    for minute in range(1, 4):
        at.to(NOON - HOUR + minute * MINUTE + SECOND)
        assert at.names(4) == ["expire"] * minute


def test_the_clock_set_forward_a_year_and_put_right(machine: Callable[..., Machine]) -> None:
    at = machine()
    at.set_clock(365 * DAY)
    for _ in range(2):
        at.turn()
        at.thread_wakes()
    assert at.names(4) == JOBS
    at.to(at.clock.now + HOUR)
    assert at.names(8) == ["audit", "expire"]
    at.set_clock(-365 * DAY)
    at.turn()
    assert at.names(10) == []
    at.to(at.clock.now + HOUR)
    assert at.names(10) == ["audit", "expire"]
    at.to(at.clock.now + DAY)
    assert at.names(12) == JOBS
    events = at.at.store.db.conn.execute("SELECT count(*) FROM events WHERE kind = 'clock_jump'")
    assert events.fetchone()[0] == 2


@pytest.mark.parametrize("steady_slept", [True, False])
@pytest.mark.parametrize("thread_first", [True, False])
def test_the_machine_asleep_for_a_day(
    machine: Callable[..., Machine], steady_slept: bool, thread_first: bool
) -> None:
    at = machine()
    (at.set_clock if steady_slept else at.pass_time)(DAY)
    if thread_first:
        at.thread_wakes()
    at.turn()  # else the loop is the first to see, and the thread may sleep on
    assert at.names(4) == JOBS
    at.thread_wakes()
    at.turn()
    assert at.names(4) == JOBS
    at.to(NOON + DAY + HOUR)
    assert at.names(8) == ["audit", "expire"]
    at.to(NOON + 2 * DAY)
    assert at.names(10) == JOBS


def test_down_for_three_days(machine: Callable[..., Machine]) -> None:
    at = machine(works=True)
    at.crash()
    at.pass_time(3 * DAY)
    at.begin()
    at.turn()
    assert at.names(4) == JOBS
    at.crash()
    at.begin()
    at.turn()
    assert at.names(8) == []
    at.to(NOON + 3 * DAY + HOUR)
    assert at.names(8) == ["audit", "expire"]
    assert {outcome for _, _, outcome in at.rows()} == {"ok"}


@pytest.mark.parametrize("name", SLOTS)
def test_down_for_two_minutes_when_it_was_planned(
    machine: Callable[..., Machine], name: str
) -> None:
    """Though it ran less than a period ago: the run before took long, or was itself a late one."""
    slot, following = SLOTS[name]
    at = machine(slot - 30 * MINUTE)
    at.to(slot - MINUTE)
    at.crash()
    at.pass_time(2 * MINUTE)
    for _ in range(2):
        at.begin()
        at.turn()
        assert at.ran(name, slot) == 1
        at.crash()
    at.begin()
    at.to(following + SECOND)
    assert (at.ran(name, slot), at.ran(name, following)) == (1, 1)


@pytest.mark.parametrize("name", SLOTS)
def test_down_while_the_clock_was_set_back(machine: Callable[..., Machine], name: str) -> None:
    slot, following = SLOTS[name]
    at = machine(slot - 30 * MINUTE)
    at.to(slot + SECOND)
    at.crash()
    at.set_clock(-20 * MINUTE)
    at.begin()
    at.to(slot + MINUTE)
    at.to(following + SECOND)
    assert (at.ran(name, slot), at.ran(name, following)) == (1, 1)


def test_what_is_due_again_while_jobs_work_waits_and_runs_once(
    machine: Callable[..., Machine],
) -> None:
    at = machine(NOON, turned=False)
    working: list[str] = []

    def take_two_hours(name: str) -> None:
        runs = [row[0] for row in at.rows()]
        if runs.count(name) > 1:
            return
        working.append(name)
        for _ in range(4):
            at.pass_time(HOUR / 2)
            at.thread_wakes()
            unfinished = [row for row in at.rows() if row[2] is None]
            assert [row[0] for row in unfinished] == [name]

    at.during = take_two_hours
    at.turn()
    assert sorted(working) == JOBS
    # The four took eight hours; two of the jobs are planned in these, and waited.
    assert at.names(4) == ["audit", "expire"]
    at.turn()
    assert at.names(6) == []
    sql = "SELECT started_at, finished_at FROM job_run ORDER BY id"
    spans = [tuple(row) for row in at.at.store.db.conn.execute(sql)]
    assert all(before[1] <= after[0] for before, after in pairwise(spans))


def test_what_came_due_while_the_job_itself_worked_is_not_lost_by_a_crash(
    machine: Callable[..., Machine],
) -> None:
    at = machine(NOON, turned=False)
    at.during = lambda name: at.pass_time(HOUR) if name == "audit" else None
    at.turn()  # the thread has not woken: nobody knows yet that 13:00 has passed
    at.during = lambda _name: None
    seen = len(at.rows())
    at.crash()
    at.begin()
    at.turn()
    assert "audit" in at.names(seen)


@pytest.mark.parametrize("name", JOBS)
def test_a_job_that_fails_stops_no_other_and_is_made_up_for(
    machine: Callable[..., Machine], name: str
) -> None:
    at = machine(NOON, turned=False)

    def fail(job: str) -> None:
        if job == name:
            raise KeditError("out of luck") if name < "d" else ValueError("no luck")

    at.during = fail
    at.turn()
    assert at.status() == {job: "failed" if job == name else "ok" for job in JOBS}
    why = at.at.store.db.conn.execute("SELECT detail FROM job_run WHERE outcome = 'failed'")
    assert [row[0] for row in why] == ["out of luck" if name < "d" else "ValueError: no luck"]
    at.turn()
    assert at.names(4) == []  # not at once again
    at.during = lambda _name: None
    at.crash()
    at.begin()
    at.turn()
    assert at.rows()[4:] == [(name, text(NOON), "ok")]


@pytest.mark.parametrize("name", JOBS)
def test_a_job_under_which_the_process_ended(
    machine: Callable[..., Machine], name: str, model_folder: Callable[[str], str]
) -> None:
    at = machine(NOON, turned=False)

    class KilledError(BaseException):
        pass

    def kill(job: str) -> None:
        if job == name:
            with at.at.store.db.transaction():
                at.at.store.db.set_meta("pid", str(os.getpid()))
            with hold_lock(at.at.home.lock_file):
                assert at.status()[name] is None  # at work
            raise KilledError

    at.during = kill
    with pytest.raises(KilledError):
        at.turn()
    done = [row[0] for row in at.rows()[:-1]]
    assert at.rows()[-1][2] is None
    assert at.status()[name] == "interrupted"  # nobody works there any more
    found = gather_status(at.at.home, at.clock.now, {}, "kedit-daemon")
    assert f"{name} interrupted" in "\n".join(render_status(found))
    assert not any(name in w["message"] for w in found["warnings"])
    at.during = lambda _name: None
    at.crash()
    at.begin()
    if name == "audit":
        folder = str(model_folder("llama"))
        at.daemon.config = at.at.config.model_copy(update={"model": folder, "device": "cpu"})
        at.daemon._load_editor()
    else:  # as it does
        with at.at.store.db.transaction():
            at.at.store.interrupt_jobs()
    assert at.rows()[-1][2] == "interrupted"
    at.turn()
    runs = at.rows()[len(done) + 1 :]
    assert sorted(row[0] for row in runs) == sorted(set(JOBS) - set(done))
    assert {row[2] for row in runs} == {"ok"}
    assert at.status() == dict.fromkeys(JOBS, "ok")
