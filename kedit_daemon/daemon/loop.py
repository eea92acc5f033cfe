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
from kedit_daemon.control import ControlRequest, ControlServer
from kedit_daemon.daemon.disk_pause import DiskPause, ignore_disk_full, wait_for_disk_space
from kedit_daemon.daemon.jobs import JobSchedule
from kedit_daemon.daemon.requests import answer_request, run_job
from kedit_daemon.editing.editor import Editor
from kedit_daemon.editing.live_model import LiveModel
from kedit_daemon.editing.memory_backoff import guard_memory
from kedit_daemon.editing.model_loading import load_model
from kedit_daemon.home import Home
from kedit_daemon.ingest.inbox import Inbox
from kedit_daemon.ingest.intake import Intake
from kedit_daemon.maintenance.restore import refuse_unfinished_restore
from kedit_daemon.publish.publisher import Publisher
from kedit_daemon.serve.supervisor import check_settings, keep_serving
from kedit_daemon.system.disk import (
    is_database_locked,
    is_disk_failure,
    is_disk_full,
    translate_disk_errors,
)
from kedit_daemon.system.lock import hold_lock
from kedit_daemon.system.log_setup import make_progress_bar
from kedit_daemon.system.sd_notify import SystemdNotifier
from memory.db import meta_keys
from memory.db.event_log import read_newest_event, write_head
from memory.db.store import JOB_OK, Store
from memory.errors import KeditError, Stopping, ends_daemon

IDLE_WAIT_SECONDS = 1.0  # the longest wait between two looks around
SETTLE_WAIT_SECONDS = 0.1  # while a file may still be growing
WATCHDOG_SECONDS = 1.0  # between two passes of the model of which the watchdog is told
WAKE_REQUEST = "wake"
log = logging.getLogger(__name__)


def utc_now() -> datetime:
    """The wall clock."""
    return datetime.now(UTC)


def run_daemon(
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
    check_settings(home, config)
    refuse_unfinished_restore(home)
    home.create_folders()
    notifier = SystemdNotifier(environ)
    with translate_disk_errors(home.state_folder), hold_lock(home.lock_file):
        refuse_unfinished_restore(
            home
        )  # again: a restore may have been between its renames just now
        if not wait_for_disk_space(home.state_folder, notifier):
            return 0
        store = Store(home.database_file, clock)
        try:
            daemon = Daemon(home, config, store, notifier, clock, monotonic)
            return daemon.run()
        finally:
            store.close()


class StopFlag:
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
        notifier: SystemdNotifier,
        clock: Callable[[], datetime],
        monotonic: Callable[[], float],
    ) -> None:
        self.home, self.config, self.store, self.notifier = home, config, store, notifier
        self.monotonic = monotonic
        self.control_server = ControlServer(home.socket_file)
        self.job_schedule = JobSchedule(vars(config.schedule), clock, monotonic)
        at = config.inbox
        self.inbox = Inbox(home.inbox_folder, at.settle_seconds, at.max_bytes, clock)
        self.intake = Intake(store, self.inbox, config)
        self.publisher = Publisher(config.publish, home, store, monotonic)
        self.disk_pause = DiskPause(store, home.state_folder, monotonic)
        self.stop_flag = StopFlag()
        self._last_scan_at = -at.rescan_seconds
        self._postponed_requests: list[ControlRequest] = []
        self._anchored_seq = 0  # the newest event that is anchored
        self._inbox_has_changed = True  # whether the inbox has been heard to change
        self._has_claimed_files = True  # whether there may be claimed files that are not taken in
        self._needs_recovery = False  # whether a turn has ended in the middle
        self._last_beat_at = -WATCHDOG_SECONDS  # when the watchdog was last told of a pass

    def run(self) -> int:
        """Load, serve until told to stop, and leave everything whole."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._request_stop())
        self.editor = self._load_editor()
        self.editor.finish_interrupted()
        self.control_server.start()
        names = vars(self.config.schedule)
        self.job_schedule.start({name: self.store.find_last_success(name) for name in names})
        watcher = threading.Thread(target=self._watch_inbox, name="inbox", daemon=True)
        watcher.start()
        self.notifier.notify_ready()
        log.info("ready: generation %d", self.store.artifacts.active_generation())
        well = False
        try:
            with keep_serving(self.home, self.config):
                while not self.stop_flag.is_set():
                    self._run_turn_or_pause()
            well = True
        except Stopping:
            well = True
        finally:
            self.notifier.notify_stopping()
            self.job_schedule.stop()
            self.control_server.stop()
            with ignore_disk_full(self.home.state_folder):
                # After an error nothing more is written: the next start finds what is whole.
                self.publisher.stop(noting=well)
                if well:
                    self._record_stop()
        return 0

    def _load_editor(self) -> Editor:
        config, store = self.config, self.store
        progress = make_progress_bar("measuring the model")
        loaded = load_model(config.model, config.device, self.home.state_folder, progress)
        served = LiveModel(loaded, store, self.home)
        served.restore()
        editor = Editor(served, config, self._poll_requests)
        with store.db.transaction():
            for key, value in {
                meta_keys.PID: str(os.getpid()),
                meta_keys.STARTED_AT: store.db.format_now(),
                meta_keys.MODEL: config.model,
                meta_keys.MODEL_HASH: loaded.base_hash,
                meta_keys.DEVICE: str(loaded.model.device),
                meta_keys.PAUSED: None,
            }.items():
                store.db.set_meta(key, value)
            store.interrupt_jobs()  # a process that was killed could not
            store.db.write_event(
                "daemon_started", model=config.model, generation=store.artifacts.active_generation()
            )
        # An audit, or the probes of a flush, may take minutes without a pulse.
        loaded.model.hf_model.register_forward_pre_hook(lambda *_: self._notify_progress())
        return editor

    # One turn -----------------------------------------------------------------------------------

    def _run_turn_or_pause(self) -> None:
        """What does not fit on the disk is done when there is room, as after a crash; what another
        process keeps from the database, in the next turn."""
        try:
            self._run_turn()
        except (OSError, sqlite3.Error) as error:
            held = is_database_locked(error)
            if not (held or is_disk_full(error, self.home.state_folder)):
                raise
            self._needs_recovery = self._has_claimed_files = True
            if held:
                log.warning("somebody else holds the database: %s", error)
                return
            self.disk_pause.record_disk_full(error)
            with ignore_disk_full(self.home.state_folder):
                self.editor.live_model.prune_side()  # what has left must not answer meanwhile

    def _run_turn(self) -> None:
        self.notifier.notify_watchdog()
        paused = self.disk_pause.check_disk()
        while self._postponed_requests:
            self._answer_request(self._postponed_requests.pop(0))  # none twice, whatever it meets
        busy = False
        if not paused:
            busy = self._do_due_work()
            self.disk_pause.record_success()
        with ignore_disk_full(self.home.state_folder):
            self._anchor_head()
        wait = (
            0.0 if busy else SETTLE_WAIT_SECONDS if self.inbox.settling_count else IDLE_WAIT_SECONDS
        )
        self._wait_for_requests(wait)

    def _do_due_work(self) -> bool:
        """Whatever is due; whether there may be more."""
        if self._needs_recovery:
            self.editor.live_model.restore_again()
            self.editor = Editor(self.editor.live_model, self.config, self._poll_requests)
            with self.store.db.transaction():
                self.store.interrupt_jobs()
            self._needs_recovery = False
        if (jump := self.job_schedule.check_clock()) is not None:
            with self.store.db.transaction():
                self.store.db.write_event("clock_jump", seconds=jump)
        self._run_due_jobs()
        self.publisher.poll_attempt()
        self._scan_inbox()
        return self.editor.step()

    def _wait_for_requests(self, seconds: float) -> None:
        try:
            request = self.control_server.requests.get(timeout=seconds) if seconds else None
            while request is not None:
                self._answer_request(request)
                request = self.control_server.requests.get_nowait()
        except Empty:
            pass

    def _poll_requests(self) -> None:
        """Between two steps of a long edit: stop if asked to, and go on answering questions."""
        if self.stop_flag.is_set():
            raise Stopping("the daemon is stopping")
        self.notifier.notify_watchdog()
        while True:
            try:
                request = self.control_server.requests.get_nowait()
            except Empty:
                return
            if request.name in ("ask", WAKE_REQUEST):
                self._answer_request(request)
            else:
                self._postponed_requests.append(request)

    def _notify_progress(self) -> None:
        """The model begins another pass: that too is progress."""
        now = self.monotonic()
        if now - self._last_beat_at >= WATCHDOG_SECONDS:
            self._last_beat_at = now
            self.notifier.notify_watchdog()

    def _scan_inbox(self) -> None:
        """The scan is the truth; what the watcher says only makes it come sooner."""
        if self._has_claimed_files:  # by the process before, or when there was no room
            for claim in self.inbox.pending_claims():
                self.intake.take_file(claim)
            self._has_claimed_files = False
        now = self.monotonic()
        woken = (
            self.inbox.settling_count
            or now - self._last_scan_at >= self.config.inbox.rescan_seconds
        )
        if not (woken or self._inbox_has_changed):
            return
        self._inbox_has_changed, self._last_scan_at = False, now
        for claim in self.inbox.claim_files(now):
            self._poll_requests()  # a file may take seconds, and there may be many
            self.intake.take_file(claim)
        refusals = self.inbox.take_refusals()
        if refusals:
            with self.store.db.transaction():
                for found in refusals:
                    self.store.db.write_event(
                        "file_refused", file=found.name, problem=found.problem, remedy=found.remedy
                    )

    # Requests and jobs --------------------------------------------------------------------------

    def _answer_request(self, request: ControlRequest) -> None:
        if request.name == WAKE_REQUEST:
            self._inbox_has_changed = True
            return
        answer_request(request, self.editor, self.disk_pause.make_refusal(), self.home.state_folder)

    def _run_due_jobs(self) -> None:
        while not self.job_schedule.due_jobs.empty():
            name, planned = self.job_schedule.due_jobs.get()
            with self.store.db.transaction():
                number = self.store.start_job(name, planned)
            outcome, detail = JOB_OK, None
            try:
                with guard_memory(self.editor.live_model):
                    detail = self._run_job(name)
            except KeditError as error:
                if ends_daemon(error):
                    raise
                outcome, detail = "failed", str(error)
            except Exception as error:  # the next job must still run
                if is_disk_failure(error) or is_database_locked(error):
                    self.job_schedule.due_jobs.put((name, planned))  # for when there is room
                    raise
                log.exception("job %s failed", name)
                outcome, detail = "failed", f"{type(error).__name__}: {error}"
            with self.store.db.transaction():
                self.store.finish_job(number, outcome, detail)

    def _run_job(self, name: str) -> str:
        return run_job(self.editor, name)

    # Start and end ------------------------------------------------------------------------------

    def _watch_inbox(self) -> None:
        folder: Path = self.inbox.folder
        for _ in watchfiles.watch(
            folder, recursive=False, debounce=50, step=20, stop_event=self.stop_flag
        ):
            self.control_server.requests.put(ControlRequest(WAKE_REQUEST, {}))

    def _request_stop(self) -> None:
        self.stop_flag.set()
        self.control_server.requests.put(ControlRequest(WAKE_REQUEST, {}))

    def _anchor_head(self) -> None:
        """Keep the newest event's hash outside the database, where a cut-off tail shows."""
        newest = read_newest_event(self.store.db.conn)
        if newest is not None and newest.seq != self._anchored_seq:
            write_head(self.home.head_file, newest)
            self._anchored_seq = newest.seq

    def _record_stop(self) -> None:
        with self.store.db.transaction():
            self.store.interrupt_jobs()
            self.store.db.write_event("daemon_stopped")
        self._anchor_head()
        self.editor.live_model.save_index()
