"""The process: one thread that edits and answers; others only knock."""

import logging
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from queue import Empty

import watchfiles

from kedit_daemon.config import Config
from kedit_daemon.control import ControlServer, Request
from kedit_daemon.daemon.disk_pause import PAUSED, Pause, wait_for_room, where_it_fits
from kedit_daemon.daemon.jobs import Jobs
from kedit_daemon.daemon.requests import answer, do_job
from kedit_daemon.editing.editor import Editor
from kedit_daemon.editing.live_model import Served
from kedit_daemon.editing.model_loading import load_model
from kedit_daemon.home import Home
from kedit_daemon.ingest.inbox import Inbox
from kedit_daemon.ingest.intake import Intake
from kedit_daemon.maintenance.restore import refuse_cut_off
from kedit_daemon.publish.publisher import Publisher
from kedit_daemon.serve.supervisor import check, keep_serving
from kedit_daemon.system.disk import broken, is_full, is_held, telling
from kedit_daemon.system.lock import hold
from kedit_daemon.system.log_setup import on_terminal
from kedit_daemon.system.sd_notify import Notifier
from memory.db.event_log import head, write_head
from memory.db.store import JOB_OK, Store
from memory.errors import STOPPING, KeditError, ends

IDLE_SECONDS = 1.0  # the longest wait between two looks around
SETTLING_SECONDS = 0.1  # while a file may still be growing
BEAT_SECONDS = 1.0  # between two passes of the model of which the watchdog is told
WAKE = "wake"
log = logging.getLogger(__name__)


def utc_now() -> datetime:
    """The wall clock."""
    return datetime.now(UTC)


def run(
    home: Home,
    config: Config,
    *,
    environ: Mapping[str, str] = os.environ,
    clock: Callable[[], datetime] = utc_now,
    monotonic: Callable[[], float] = time.monotonic,
) -> int:
    """Run the daemon in the foreground until SIGTERM or SIGINT; the exit code. Where the disk is
    full it waits for room.

    Raises KeditError: another daemon holds the home (75); the model, or what [serve] says, cannot
    be used, a restore was cut off, or the database is damaged (78); the disk fails, and then
    nothing more is written.
    """
    check(home, config)
    refuse_cut_off(home)
    home.create()
    notifier = Notifier(environ)
    with telling(home.state), hold(home.lock):
        refuse_cut_off(home)  # again: a restore may have been between its renames just now
        if not wait_for_room(home.state, notifier):
            return 0
        store = Store(home.database, clock)
        try:
            daemon = Daemon(home, config, store, notifier, clock, monotonic)
            return daemon.run()
        finally:
            store.close()


class Flag:
    """An event that nobody waits for, so that it needs no lock: a signal's handler sets it, which
    may have interrupted another that was about to."""

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        """From now on it is."""
        self._set = True

    def is_set(self) -> bool:
        """Whether it is."""
        return self._set


class Daemon:
    """The loop: control requests, jobs, the inbox, then one step of editing."""

    def __init__(
        self,
        home: Home,
        config: Config,
        store: Store,
        notifier: Notifier,
        clock: Callable[[], datetime],
        monotonic: Callable[[], float],
    ) -> None:
        self.home, self.config, self.store, self.notifier = home, config, store, notifier
        self.monotonic = monotonic
        self.control = ControlServer(home.socket)
        self.jobs = Jobs(vars(config.schedule), clock, monotonic)
        at = config.inbox
        self.inbox = Inbox(home.inbox, at.settle_seconds, at.max_bytes, clock)
        self.intake = Intake(store, self.inbox, config)
        self.publisher = Publisher(config.publish, home, store, monotonic)
        self.pause = Pause(store, home.state, monotonic)
        self.stopping = Flag()
        self._scanned = -at.rescan_seconds
        self._postponed: list[Request] = []
        self._head = 0  # the newest event that is anchored
        self._woken = True  # whether the inbox has been heard to change
        self._claimed = True  # whether there may be claimed files that are not taken in
        self._torn = False  # whether a turn has ended in the middle
        self._beaten = -BEAT_SECONDS  # when the watchdog was last told of a pass

    def run(self) -> int:
        """Load, serve until told to stop, and leave everything whole."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop())
        self.editor = self._load()
        self.editor.resume()
        self.control.start()
        names = vars(self.config.schedule)
        self.jobs.start({name: self.store.last_success(name) for name in names})
        watcher = threading.Thread(target=self._watch, name="inbox", daemon=True)
        watcher.start()
        self.notifier.ready()
        log.info("ready: generation %d", self.store.active_generation())
        well = False
        try:
            with keep_serving(self.home, self.config):
                while not self.stopping.is_set():
                    self._turn_or_pause()
            well = True
        except KeditError as error:
            if error.code != STOPPING:
                raise
            well = True
        finally:
            self.notifier.stopping()
            self.jobs.stop()
            self.control.stop()
            with where_it_fits(self.home.state):
                # After an error nothing more is written: the next start finds what is whole.
                self.publisher.stop(noting=well)
                if well:
                    self._finish()
        return 0

    def _load(self) -> Editor:
        config, store = self.config, self.store
        progress = on_terminal("measuring the model")
        loaded = load_model(config.model, config.device, self.home.state, progress)
        served = Served(loaded, store, self.home)
        served.restore()
        editor = Editor(served, config, self._pulse)
        with store.transaction():
            for key, value in {
                "pid": str(os.getpid()),
                "started_at": store.now(),
                "model": config.model,
                "model_hash": loaded.base_hash,
                "device": str(loaded.model.device),
                PAUSED: None,
            }.items():
                store.set_meta(key, value)
            store.interrupt_jobs()  # a process that was killed could not
            store.event("daemon_started", model=config.model, generation=store.active_generation())
        # An audit, or the probes of a flush, may take minutes without a pulse.
        loaded.model.model.register_forward_pre_hook(lambda *_: self._beat())
        return editor

    # One turn -----------------------------------------------------------------------------------

    def _turn_or_pause(self) -> None:
        """What does not fit on the disk is done when there is room, as after a crash; what another
        process keeps from the database, in the next turn."""
        try:
            self._turn()
        except (OSError, sqlite3.Error) as error:
            held = is_held(error)
            if not (held or is_full(error, self.home.state)):
                raise
            self._torn = self._claimed = True
            if held:
                log.warning("somebody else holds the database: %s", error)
                return
            self.pause.ran_out(error)
            with where_it_fits(self.home.state):
                self.editor.served.forget_side()  # what has left must not answer meanwhile

    def _turn(self) -> None:
        self.notifier.watchdog()
        paused = self.pause.look()
        while self._postponed:
            self._answer(self._postponed.pop(0))  # none twice, whatever it meets
        busy = False
        if not paused:
            busy = self._work()
            self.pause.worked()
        with where_it_fits(self.home.state):
            self._anchor()
        wait = 0.0 if busy else SETTLING_SECONDS if self.inbox.settling else IDLE_SECONDS
        self._wait(wait)

    def _work(self) -> bool:
        """Whatever is due; whether there may be more."""
        if self._torn:
            self.editor.served.restore_again()
            self.editor = Editor(self.editor.served, self.config, self._pulse)
            with self.store.transaction():
                self.store.interrupt_jobs()
            self._torn = False
        if (jump := self.jobs.guard()) is not None:
            with self.store.transaction():
                self.store.event("clock_jump", seconds=jump)
        self._run_jobs()
        self.publisher.look()
        self._look_into_inbox()
        return self.editor.step()

    def _wait(self, seconds: float) -> None:
        try:
            request = self.control.requests.get(timeout=seconds) if seconds else None
            while request is not None:
                self._answer(request)
                request = self.control.requests.get_nowait()
        except Empty:
            pass

    def _pulse(self) -> None:
        """Between two steps of a long edit: stop if asked to, and go on answering questions."""
        if self.stopping.is_set():
            raise KeditError("the daemon is stopping", code=STOPPING)
        self.notifier.watchdog()
        while True:
            try:
                request = self.control.requests.get_nowait()
            except Empty:
                return
            if request.name in ("ask", WAKE):
                self._answer(request)
            else:
                self._postponed.append(request)

    def _beat(self) -> None:
        """The model begins another pass: that too is progress."""
        now = self.monotonic()
        if now - self._beaten >= BEAT_SECONDS:
            self._beaten = now
            self.notifier.watchdog()

    def _look_into_inbox(self) -> None:
        """The scan is the truth; what the watcher says only makes it come sooner."""
        if self._claimed:  # by the process before, or when there was no room
            for claim in self.inbox.pending_claims():
                self.intake.take(claim)
            self._claimed = False
        now = self.monotonic()
        woken = self.inbox.settling or now - self._scanned >= self.config.inbox.rescan_seconds
        if not (woken or self._woken):
            return
        self._woken, self._scanned = False, now
        for claim in self.inbox.scan(now):
            self._pulse()  # a file may take seconds, and there may be many
            self.intake.take(claim)
        refusals = self.inbox.take_refusals()
        if refusals:
            with self.store.transaction():
                for found in refusals:
                    self.store.event(
                        "file_refused", file=found.name, problem=found.problem, remedy=found.remedy
                    )

    # Requests and jobs --------------------------------------------------------------------------

    def _answer(self, request: Request) -> None:
        if request.name == WAKE:
            self._woken = True
            return
        answer(request, self.editor, self.pause.refusal(), self.home.state)

    def _run_jobs(self) -> None:
        while not self.jobs.due.empty():
            name, planned = self.jobs.due.get()
            with self.store.transaction():
                number = self.store.start_job(name, planned)
            outcome, detail = JOB_OK, None
            try:
                with self.editor.spared():
                    detail = self._job(name)
            except KeditError as error:
                if ends(error):
                    raise
                outcome, detail = "failed", str(error)
            except Exception as error:  # the next job must still run
                if broken(error) or is_held(error):
                    self.jobs.due.put((name, planned))  # for when there is room
                    raise
                log.exception("job %s failed", name)
                outcome, detail = "failed", f"{type(error).__name__}: {error}"
            with self.store.transaction():
                self.store.finish_job(number, outcome, detail)

    def _job(self, name: str) -> str:
        return do_job(self.editor, name)

    # Start and end ------------------------------------------------------------------------------

    def _watch(self) -> None:
        folder: Path = self.inbox.folder
        for _ in watchfiles.watch(
            folder, recursive=False, debounce=50, step=20, stop_event=self.stopping
        ):
            self.control.requests.put(Request(WAKE, {}))

    def _stop(self) -> None:
        self.stopping.set()
        self.control.requests.put(Request(WAKE, {}))

    def _anchor(self) -> None:
        """Keep the newest event's hash outside the database, where a cut-off tail shows."""
        newest = head(self.store.conn)
        if newest is not None and newest.seq != self._head:
            write_head(self.home.head, newest)
            self._head = newest.seq

    def _finish(self) -> None:
        with self.store.transaction():
            self.store.interrupt_jobs()
            self.store.event("daemon_stopped")
        self._anchor()
        self.editor.served.save_index()
