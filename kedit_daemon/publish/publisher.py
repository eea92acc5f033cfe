"""After a switch of the generation: export it, and tell those who serve it.

The work is done in a thread, most of it in a child process, so that the edit loop goes on; the loop
looks in, writes down what came of it, and begins again where something failed.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from kedit_daemon.config import PublishConfig
from kedit_daemon.home import Home
from kedit_daemon.publish.export.folder import list_exports, prune_exports
from kedit_daemon.publish.export.source import read_source
from kedit_daemon.publish.vllm import load_adapter, reload_weights, resume_server, unload_adapter
from kedit_daemon.system.backoff import Backoff
from memory.db import meta_keys
from memory.db.event_log import to_canonical_json
from memory.db.store import Store
from memory.errors import KeditError, Stopping

RETRY_SECONDS, MAX_RETRY_SECONDS = 60.0, 3600.0
COMMAND_SECONDS = 600.0
EXPORT_SECONDS = 3600.0
STOP_SECONDS = 30.0  # for what is under way to end by itself
EXPORT_NICENESS = 10  # of the export; not of the command, which may start a server
MAX_ERROR_CHARS = 500  # characters of what a child complains about


@dataclass(frozen=True)
class PublishOutcome:
    """What came of publishing: the generation and its folder, if it has one, or why not."""

    generation: int
    path: str = ""
    reason: str = ""


class Publisher:
    """Publishes what is active, once. All methods belong to the edit loop's thread."""

    def __init__(
        self,
        config: PublishConfig,
        home: Home,
        store: Store,
        monotonic: Callable[[], float],
    ) -> None:
        self.config, self.home, self.store = config, home, store
        self._attempt: _PublishAttempt | None = None
        self._backoff = Backoff(RETRY_SECONDS, MAX_RETRY_SECONDS, monotonic)
        self._failed_generation = 0  # the one that the backoff counts the failures of

    def poll_attempt(self) -> None:
        """Take note of what has been done, and begin what is due. Never waits."""
        if self._attempt is not None:
            if self._attempt.is_alive():
                return
            self._record_outcome(self._attempt.outcome)
            self._attempt = None
        active = self.store.artifacts.active_generation()
        if self.config.kind is None:
            self._forget_failure()
            return
        published = self.store.db.get_meta(meta_keys.PUBLISHED)
        if not active or self._publication_key(active) == published:
            return
        if active != self._failed_generation or self._backoff.is_due():
            # An adapter of no facts cannot be made, and the one before must not be served on.
            empty = (
                self.config.kind == "lora"
                and not self.store.artifacts.get_generation(active).fact_ids
            )
            self._attempt = _PublishAttempt(self.config, self.home, active, empty)
            self._attempt.start()

    def stop(self, noting: bool = True) -> None:
        """End what is under way; what is not finished, or not noted, is begun again by the next
        process."""
        work, self._attempt = self._attempt, None
        if work is None:
            return
        work.request_stop()
        work.join(STOP_SECONDS)
        if work.is_alive():
            work.release_server()
        elif noting and not work.outcome.reason:
            self._record_outcome(work.outcome)

    def _publication_key(self, generation: int) -> str:
        """A change of the settings, too, is something to publish."""
        return to_canonical_json([generation, self.config.model_dump(exclude={"keep"})])

    def _forget_failure(self) -> None:
        """Nothing is to be published any more, so nothing is amiss."""
        if self.store.db.get_meta(meta_keys.PUBLISH_FAILED) is not None:
            with self.store.db.transaction():
                self.store.db.set_meta(meta_keys.PUBLISH_FAILED, None)

    def _record_outcome(self, outcome: PublishOutcome) -> None:
        told: dict[str, Any] = {"generation": outcome.generation, "export": self.config.kind}
        if not outcome.reason:
            self._failed_generation = 0
            told |= {"path": outcome.path} if outcome.path else {"export": None}
            key = self._publication_key(outcome.generation)
            with self.store.db.transaction():
                self.store.db.set_meta(meta_keys.PUBLISHED, key)
                self.store.db.set_meta(meta_keys.PUBLISH_FAILED, None)
                self.store.db.write_event("published", **told)
            return
        if outcome.generation != self._failed_generation:
            self._backoff.reset()
        self._failed_generation = outcome.generation
        wait = self._backoff.record_failure()
        with self.store.db.transaction():
            self.store.db.set_meta(meta_keys.PUBLISH_FAILED, outcome.reason)
            self.store.db.write_event(
                "publish_failed", **told, reason=outcome.reason, retry_seconds=wait
            )


class _PublishAttempt(threading.Thread):
    """One attempt; `outcome` may be read when it has ended."""

    def __init__(self, config: PublishConfig, home: Home, generation: int, empty: bool) -> None:
        super().__init__(name="publish", daemon=True)
        self.config, self.home, self.generation, self.has_no_facts = config, home, generation, empty
        self.outcome = PublishOutcome(generation, reason="it ended unexpectedly")
        self._stop_requested = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._start_lock = threading.Lock()  # no child or pause may start once it is to end
        self._may_be_paused = False  # whether a server may stand still for us

    def request_stop(self) -> None:
        """Let it end soon: no further step is begun, and a child is told to end."""
        with self._start_lock:
            self._stop_requested.set()
            if self._child is not None:
                self._child.terminate()

    def release_server(self) -> None:
        """Where it does not end, let go on at least what stands still for it."""
        if self._may_be_paused and self.config.vllm is not None:
            with suppress(KeditError):  # the next process pauses it again, and tries again
                resume_server(self.config.vllm, tries=1)

    def run(self) -> None:
        try:
            self.outcome = (
                self._withdraw_adapters() if self.has_no_facts else self._publish_export()
            )
        except KeditError as error:
            self.outcome = PublishOutcome(self.generation, reason=str(error))
        except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
            self.outcome = PublishOutcome(
                self.generation, reason=f"{type(error).__name__}: {error}"
            )

    def _publish_export(self) -> PublishOutcome:
        made = self._run_export()
        path, generation = str(made["path"]), int(made["manifest"]["generation"])
        self._run_command(path, generation)
        self._notify_server(path)
        prune_exports(
            Path(path), self.config.keep, self._unload_adapters
        )  # not before servers have the new one
        return PublishOutcome(generation, path)

    def _withdraw_adapters(self) -> PublishOutcome:
        """No fact is in the weights: no adapter of this home may be served on."""
        self._run_command("", self.generation)
        if self.config.vllm is not None:
            home = read_source(self.home).origin
            for path in list_exports(self._export_folder, "lora", home):
                unload_adapter(self.config.vllm, path.name)
        return PublishOutcome(self.generation)

    @property
    def _export_folder(self) -> Path:
        return Path(str(self.config.folder)).expanduser()

    def _run_export(self) -> Any:
        # -P: what stands in the folder that the daemon was started in is none of its modules.
        command = [sys.executable, "-P", "-m", "kedit_daemon", "--home", str(self.home.root)]
        command += ["export", str(self.config.kind), str(self._export_folder), "--json"]
        return json.loads(self._run_child(command, {}, EXPORT_SECONDS))

    def _run_command(self, path: str, generation: int) -> None:
        told = {
            "KEDIT_EXPORT": path,
            "KEDIT_GENERATION": str(generation),
            "KEDIT_NAME": Path(path).name,
        }
        if self.config.command:
            self._run_child(self.config.command, told, COMMAND_SECONDS)

    def _notify_server(self, path: str) -> None:
        if self.config.vllm is None:
            return
        with self._start_lock:
            self._check_not_stopping()
            self._may_be_paused = self.config.kind != "lora"
        if self.config.kind == "lora":
            load_adapter(self.config.vllm, Path(path).name, path)
        else:
            reload_weights(self.config.vllm, path, self._stop_requested.is_set)
        self._may_be_paused = False

    def _unload_adapters(self, names: Sequence[str]) -> None:
        if self.config.kind == "lora" and self.config.vllm is not None:
            for name in names:
                with suppress(KeditError):  # it may never have been there
                    unload_adapter(self.config.vllm, name)

    def _check_not_stopping(self) -> None:
        if self._stop_requested.is_set():
            raise Stopping("the daemon is stopping")

    def _run_child(self, command: list[str], told: Mapping[str, str], seconds: float) -> bytes:
        """What a child process prints; a KeditError with its last words when it fails."""
        # Files, not pipes: a server that the command has started may keep them open.
        with TemporaryFile() as said, TemporaryFile() as complaint:
            with self._start_lock:
                self._check_not_stopping()
                self._child = child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=said,
                    stderr=complaint,
                    env=os.environ | told,
                )
            with child:
                try:
                    if not told:
                        os.setpriority(
                            os.PRIO_PROCESS, child.pid, EXPORT_NICENESS
                        )  # editing goes first
                    child.wait(seconds)
                finally:
                    child.kill()
            said.seek(0), complaint.seek(0)
            if child.returncode:
                raise KeditError(_extract_error(child, complaint.read()), code="publish")
            return said.read()


def _extract_error(child: "subprocess.Popen[bytes]", complaint: bytes) -> str:
    lines = complaint.decode(errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("error[")] or lines[-1:]
    why = " ".join(errors) or f"exit code {child.returncode}"
    program = child.args[0] if isinstance(child.args, list) else child.args
    return f"{Path(str(program)).name}: {why[:MAX_ERROR_CHARS]}"
