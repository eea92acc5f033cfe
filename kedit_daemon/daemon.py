"""The process: one thread that edits and answers; others only knock."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from queue import Empty

import watchfiles

from kedit_daemon.config import Config
from kedit_daemon.control import ControlServer, Request
from kedit_daemon.editor import Editor
from kedit_daemon.home import Home
from kedit_daemon.inbox import Inbox
from kedit_daemon.intake import Intake
from kedit_daemon.jobs import Jobs
from kedit_daemon.loading import load_model
from kedit_daemon.lock import hold
from kedit_daemon.logs import on_terminal
from kedit_daemon.notify import Notifier
from kedit_daemon.orders import carry_out
from kedit_daemon.publish import Publisher
from kedit_daemon.serve.process import check, keep_serving
from kedit_daemon.serving import Served
from memory.errors import KeditError
from memory.ledger import head, write_head
from memory.store import JOB_OK, Store

IDLE_SECONDS = 1.0  # the longest wait between two looks around
SETTLING_SECONDS = 0.1  # while a file may still be growing
DISK_FREE_BYTES = 64 << 20  # below it no work is taken
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
    """Run the daemon in the foreground until SIGTERM or SIGINT; the exit code.

    Raises KeditError: another daemon holds the home (75), or the model, or what [serve] says,
    cannot be used (78).
    """
    check(home, config)
    home.create()
    with hold(home.lock):
        store = Store(home.database, clock)
        try:
            daemon = Daemon(home, config, store, Notifier(environ), clock, monotonic)
            return daemon.run()
        finally:
            store.close()


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
        self.stopping = threading.Event()
        self._scanned = -at.rescan_seconds
        self._postponed: list[Request] = []
        self._head = 0  # the newest event that is anchored
        self._woken = True  # whether the inbox has been heard to change

    def run(self) -> int:
        """Load, serve until told to stop, and leave everything whole."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop())
        self.editor = self._load()
        self.editor.resume()
        for claim in self.inbox.pending_claims():
            self.intake.take(claim)
        self.control.start()
        names = vars(self.config.schedule)
        self.jobs.start({name: self.store.last_success(name) for name in names})
        watcher = threading.Thread(target=self._watch, name="inbox", daemon=True)
        watcher.start()
        self.notifier.ready()
        log.info("ready: generation %d", self.store.active_generation())
        try:
            with keep_serving(self.home, self.config):
                while not self.stopping.is_set():
                    self._turn()
        except KeditError as error:
            if error.code != "stopping":
                raise
        finally:
            self.notifier.stopping()
            self.jobs.stop()
            self.control.stop()
            self.publisher.stop()
            self._finish()
        return 0

    def _load(self) -> Editor:
        config, store = self.config, self.store
        progress = on_terminal("measuring the model")
        loaded = load_model(config.model, config.device, self.home.state, progress)
        served = Served(loaded, store, self.home)
        served.restore()
        with store.transaction():
            for key, value in {
                "pid": str(os.getpid()),
                "started_at": store.now(),
                "model": config.model,
                "model_hash": loaded.base_hash,
                "device": str(loaded.model.device),
                "paused": None,
            }.items():
                store.set_meta(key, value)
            store.interrupt_jobs()  # a process that was killed could not
            store.event("daemon_started", model=config.model, generation=store.active_generation())
        return Editor(served, config, self._pulse)

    # One turn -----------------------------------------------------------------------------------

    def _turn(self) -> None:
        self.notifier.watchdog()
        for request in self._postponed:
            self._answer(request)
        self._postponed.clear()
        if (jump := self.jobs.guard()) is not None:
            with self.store.transaction():
                self.store.event("clock_jump", seconds=jump)
        self._run_jobs()
        self.publisher.look()
        self._look_into_inbox()
        busy = not self._paused() and self.editor.step()
        self._anchor()
        wait = 0.0 if busy else SETTLING_SECONDS if self.inbox.settling else IDLE_SECONDS
        self._wait(wait)

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
            raise KeditError("the daemon is stopping", code="stopping")
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

    def _look_into_inbox(self) -> None:
        """The scan is the truth; what the watcher says only makes it come sooner."""
        now = self.monotonic()
        woken = self.inbox.settling or now - self._scanned >= self.config.inbox.rescan_seconds
        if not (woken or self._woken) or self._paused():
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

    def _paused(self) -> bool:
        """Take no work while the disk is full; serving goes on."""
        at = os.statvfs(self.home.state)
        why = "disk full" if at.f_bavail * at.f_frsize < DISK_FREE_BYTES else None
        if why != self.store.meta("paused"):
            with self.store.transaction():
                self.store.set_meta("paused", why)
                self.store.event("paused" if why else "resumed", reason=why)
        return why is not None

    # Requests and jobs --------------------------------------------------------------------------

    def _answer(self, request: Request) -> None:
        if request.name == WAKE:
            self._woken = True
            return
        try:
            request.answer(carry_out(self.editor, request.name, request.arguments))
        except KeditError as error:
            request.refuse(error)
            if error.code == "stopping":
                raise
        except Exception as error:  # a request must not end the daemon
            log.exception("%s failed", request.name)
            request.refuse(KeditError(f"{type(error).__name__}: {error}", code="unexpected"))

    def _run_jobs(self) -> None:
        while not self.jobs.due.empty():
            name, planned = self.jobs.due.get()
            with self.store.transaction():
                number = self.store.start_job(name, planned)
            outcome, detail = JOB_OK, None
            try:
                detail = self._job(name)
            except KeditError as error:
                if error.code == "stopping":
                    raise
                outcome, detail = "failed", str(error)
            except Exception as error:  # the next job must still run
                log.exception("job %s failed", name)
                outcome, detail = "failed", f"{type(error).__name__}: {error}"
            with self.store.transaction():
                self.store.finish_job(number, outcome, detail)

    def _job(self, name: str) -> str:
        if name == "audit":
            return str(self.editor.audit()["verdict"])
        if name == "consolidate":
            done = self.editor.consolidate(False)
            return "changed" if done["taken"] else "; ".join(done["reasons"]) or "unchanged"
        if name == "retention":
            figures = self.editor.auditor.retention.probe()["figures"]
            return ", ".join(f"{n} {v:.3f}" for n, v in figures.items() if v is not None) or "none"
        return f"{self.editor.expire()} expired"

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
