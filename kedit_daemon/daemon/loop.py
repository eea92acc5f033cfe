"""The daemon's process: one thread that edits and answers, and that all others only wake up."""

import logging
import math
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Collection, Mapping
from datetime import UTC, datetime
from queue import Empty

from kedit_daemon.config import Config
from kedit_daemon.control import ControlRequest, ControlServer
from kedit_daemon.daemon.disk_pause import DiskPause, ignore_disk_full, wait_for_disk_space
from kedit_daemon.daemon.inbox_scanner import InboxScanner
from kedit_daemon.daemon.job_runner import LONG_JOBS, run_due_jobs
from kedit_daemon.daemon.job_schedule import JobSchedule
from kedit_daemon.daemon.requests import answer_request
from kedit_daemon.daemon.stop_flag import StopFlag
from kedit_daemon.daemon.watchdog import Watchdog
from kedit_daemon.editing.editor import Editor
from kedit_daemon.editing.gguf_cache import GgufCache
from kedit_daemon.editing.live_model import LiveModel
from kedit_daemon.editing.model_loading import load_model
from kedit_daemon.home import Home
from kedit_daemon.maintenance.restore import refuse_unfinished_restore
from kedit_daemon.publish.publisher import Publisher
from kedit_daemon.serve.supervisor import check_settings, keep_serving
from kedit_daemon.system.allocator import release_free_memory
from kedit_daemon.system.disk import is_database_locked, is_disk_full, translate_disk_errors
from kedit_daemon.system.lock import hold_lock
from kedit_daemon.system.log_setup import make_progress_bar
from kedit_daemon.system.sd_notify import SystemdNotifier
from memory.db import meta_keys
from memory.db.event_log import read_newest_event, write_head
from memory.db.store import Store
from memory.errors import Stopping

IDLE_WAIT_SECONDS = 1.0  # the longest wait for a request before the next turn
SETTLE_WAIT_SECONDS = 0.1  # the same, while a file may still be growing
START_GRACE_SECONDS = 20.0  # after a start, before the first long job
JOB_PATIENCE_SECONDS = 60.0  # for which a long job waits while facts do
RELEASE_SECONDS = 5.0  # between two times that freed memory is given back
WAKE_REQUEST = "wake"
log = logging.getLogger(__name__)


def utc_now() -> datetime:
    """Read the wall clock."""
    return datetime.now(UTC)


def run_daemon(
    home: Home,
    config: Config,
    *,
    environ: Mapping[str, str] = os.environ,
    clock: Callable[[], datetime] = utc_now,
    monotonic: Callable[[], float] = time.monotonic,
) -> int:
    """Run the daemon in the foreground until SIGTERM or SIGINT and return the exit code.

    While the disk is full it waits for space. Raises KeditError: another daemon holds the home
    (75); the model or [serve] cannot be used, a restore was cut off, or the database is damaged
    (78); the disk fails, and then nothing more is written.
    """
    check_settings(home, config)
    refuse_unfinished_restore(home)
    home.create_folders()
    notifier = SystemdNotifier(environ)
    with translate_disk_errors(home.state_folder), hold_lock(home.lock_file):
        refuse_unfinished_restore(home)  # again: before the lock, one may have been renaming
        if not wait_for_disk_space(home.state_folder, notifier):
            return 0
        store = Store(home.database_file, clock)
        try:
            return Daemon(home, config, store, notifier, clock, monotonic).run()
        finally:
            store.close()


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
        self.watchdog = Watchdog(notifier, monotonic)
        self.control_server = ControlServer(home.socket_file)
        self.job_schedule = JobSchedule(vars(config.schedule), clock, monotonic)
        folders = home.inbox_folder, home.pictures_folder
        self.inbox_scanner = InboxScanner(*folders, store, config, clock, monotonic)
        self.publisher = Publisher(config.publish, home, store, monotonic)
        self.disk_pause = DiskPause(store, home.state_folder, monotonic)
        self.stop_flag = StopFlag()
        self._postponed_requests: list[ControlRequest] = []
        self._monotonic = monotonic
        self._long_jobs_from = monotonic()
        self._released_at = -math.inf  # when freed memory was last given back
        self._busy_since: float | None = None  # when the first of the facts that wait came
        self._anchored_seq = 0  # the newest event that is anchored
        self._needs_recovery = False  # whether a turn has ended in the middle

    def run(self) -> int:
        """Load the model, work until told to stop, and leave everything whole."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._request_stop())
        self.editor = self._load_editor()
        self.control_server.start()
        self.job_schedule.start(self._find_last_runs())
        self._long_jobs_from = self._monotonic() + START_GRACE_SECONDS
        threading.Thread(target=self._watch_inbox, name="inbox", daemon=True).start()
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
                self.publisher.stop(recording=well)
                if well:
                    self._record_stop()
        return 0

    def _load_editor(self) -> Editor:
        config, store = self.config, self.store
        progress = make_progress_bar("measuring the model")
        loaded = load_model(
            config.model,
            config.device,
            self.home.state_folder,
            progress,
            gguf_cache=GgufCache(self.home.models_folder),
            dtype=config.dtype,
        )
        live_model = LiveModel(loaded, store, self.home)
        live_model.restore()
        editor = Editor(live_model, config, self._poll_requests)
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
            active = store.artifacts.active_generation()
            store.db.write_event("daemon_started", model=config.model, generation=active)
        self.watchdog.ping_on_passes_of(loaded.model.hf_model)
        return editor

    def _find_last_runs(self) -> dict[str, str | None]:
        """Find when each job last succeeded. A home without facts has nothing to look after: its
        jobs begin with their next planned time, and its first fact does not wait for them."""
        names, now = vars(self.config.schedule), self.store.db.format_now()
        if not self.store.has_facts():
            return dict.fromkeys(names, now)
        return {name: self.store.find_last_success(name) for name in names}

    # One turn -----------------------------------------------------------------------------------

    def _run_turn_or_pause(self) -> None:
        """Run a turn; where the disk is full, pause, and recover as after a crash once it is not.

        Where another process locks the database, the next turn tries again.
        """
        try:
            self._run_turn()
        except (OSError, sqlite3.Error) as error:
            locked = is_database_locked(error)
            if not (locked or is_disk_full(error, self.home.state_folder)):
                raise
            self._needs_recovery = self.inbox_scanner.has_claimed_files = True
            if locked:
                log.warning("another process holds the database: %s", error)
                return
            self.disk_pause.record_disk_full(error)
            with ignore_disk_full(self.home.state_folder):
                self.editor.live_model.prune_side()  # facts that have left must not answer

    def _run_turn(self) -> None:
        self.watchdog.ping()
        paused = self.disk_pause.check_disk()
        while self._postponed_requests:
            self._answer_request(self._postponed_requests.pop(0))  # none twice, even if it fails
        busy = False
        if not paused:
            busy = self._do_due_work()
            self.disk_pause.record_success()
        with ignore_disk_full(self.home.state_folder):
            self._anchor_head()
        if not busy and self._monotonic() - self._released_at >= RELEASE_SECONDS:
            release_free_memory()
            self._released_at = self._monotonic()
        settling = self.inbox_scanner.inbox.settling_count
        wait = SETTLE_WAIT_SECONDS if settling else IDLE_WAIT_SECONDS
        self._wait_for_requests(0.0 if busy else wait)

    def _do_due_work(self) -> bool:
        """Do what is due and return whether there may be more."""
        if self._needs_recovery:
            self.editor.live_model.restore_again()
            self.editor = Editor(self.editor.live_model, self.config, self._poll_requests)
            with self.store.db.transaction():
                self.store.interrupt_jobs()
            self._needs_recovery = False
        if (jump := self.job_schedule.check_clock()) is not None:
            with self.store.db.transaction():
                self.store.db.write_event("clock_jump", seconds=jump)
        self.publisher.poll_attempt()
        self.inbox_scanner.scan_if_due(self._poll_requests)
        busy = self.editor.step()
        run_due_jobs(self.job_schedule, self.store, self.editor, self._list_postponed_jobs(busy))
        return busy

    def _list_postponed_jobs(self, busy: bool) -> Collection[str]:
        """List the jobs that wait, since facts come first: those that take long, at most for
        JOB_PATIENCE_SECONDS while one fact follows the other, and for the first that are submitted
        after a start."""
        now = self._monotonic()
        if not (busy or self.inbox_scanner.inbox.settling_count):
            self._busy_since = None
            return LONG_JOBS if now < self._long_jobs_from else ()
        if self._busy_since is None:
            self._busy_since = now
        return LONG_JOBS if now - self._busy_since < JOB_PATIENCE_SECONDS else ()

    def _wait_for_requests(self, seconds: float) -> None:
        try:
            request = self.control_server.requests.get(timeout=seconds) if seconds else None
            while request is not None:
                self._answer_request(request)
                request = self.control_server.requests.get_nowait()
        except Empty:
            pass

    def _poll_requests(self) -> None:
        """Between two steps of a long edit: stop if asked to, and answer questions."""
        if self.stop_flag.is_set():
            raise Stopping("the daemon is stopping")
        self.watchdog.ping()
        while True:
            try:
                request = self.control_server.requests.get_nowait()
            except Empty:
                return
            if request.name in ("ask", WAKE_REQUEST):
                self._answer_request(request)
            else:
                self._postponed_requests.append(request)

    def _answer_request(self, request: ControlRequest) -> None:
        if request.name == WAKE_REQUEST:
            self.inbox_scanner.has_changed = True
            return
        answer_request(request, self.editor, self.disk_pause.make_refusal(), self.home.state_folder)

    # Other threads, signals and the end -----------------------------------------------------------

    def _watch_inbox(self) -> None:
        self.inbox_scanner.watch(self.stop_flag, self._wake_up)

    def _request_stop(self) -> None:
        self.stop_flag.set()
        self._wake_up()

    def _wake_up(self) -> None:
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
