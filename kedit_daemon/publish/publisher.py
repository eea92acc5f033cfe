"""Publishes the active generation: exports it, runs a command and switches a vLLM server to it.

The work is done in a thread, most of it in a child process, so that the edit loop goes on. The loop
polls the attempt, records its outcome, and retries later what failed.
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
from memory.canonical_json import to_canonical_json
from memory.db import meta_keys
from memory.db.store import Store
from memory.errors import KeditError, Stopping

RETRY_SECONDS, MAX_RETRY_SECONDS = 60.0, 3600.0
COMMAND_SECONDS = 600.0
EXPORT_SECONDS = 3600.0
STOP_SECONDS = 30.0  # for a running attempt to end by itself
EXPORT_NICENESS = 10  # not for the command, which may start a server
MAX_ERROR_CHARS = 500  # of a child's error text


@dataclass(frozen=True)
class PublishOutcome:
    """The published generation and its folder, if it has one, or the reason of the failure."""

    generation: int
    path: str = ""
    reason: str = ""


class Publisher:
    """Publishes each active generation once. All methods belong to the edit loop's thread."""

    def __init__(
        self, config: PublishConfig, home: Home, store: Store, monotonic: Callable[[], float]
    ) -> None:
        self.config, self.home, self.store = config, home, store
        self._attempt: _PublishAttempt | None = None
        self._backoff = Backoff(RETRY_SECONDS, MAX_RETRY_SECONDS, monotonic)
        self._failed_generation = 0  # the one that the backoff counts the failures of

    def poll_attempt(self) -> None:
        """Record a finished attempt and start the one that is due. Never waits."""
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
            # No adapter can be made of no facts, and the one before must no longer be served.
            facts = self.store.artifacts.get_generation(active).fact_ids
            withdraw = self.config.kind in ("lora", "gguf-lora") and not facts
            self._attempt = _PublishAttempt(self.config, self.home, active, withdraw)
            self._attempt.start()

    def stop(self, recording: bool = True) -> None:
        """End a running attempt and record its success, if `recording`.

        The next process repeats what is unfinished or not recorded.
        """
        attempt, self._attempt = self._attempt, None
        if attempt is None:
            return
        attempt.request_stop()
        attempt.join(STOP_SECONDS)
        if attempt.is_alive():
            attempt.release_server()
        elif recording and not attempt.outcome.reason:
            self._record_outcome(attempt.outcome)

    def _publication_key(self, generation: int) -> str:
        """Name what is published: a change of the settings is published too."""
        return to_canonical_json([generation, self.config.model_dump(exclude={"keep"})])

    def _forget_failure(self) -> None:
        """Clear the recorded failure, since nothing is published any more."""
        if self.store.db.get_meta(meta_keys.PUBLISH_FAILED) is not None:
            with self.store.db.transaction():
                self.store.db.set_meta(meta_keys.PUBLISH_FAILED, None)

    def _record_outcome(self, outcome: PublishOutcome) -> None:
        data: dict[str, Any] = {"generation": outcome.generation, "export": self.config.kind}
        if not outcome.reason:
            self._failed_generation = 0
            data |= {"path": outcome.path} if outcome.path else {"export": None}
            key = self._publication_key(outcome.generation)
            with self.store.db.transaction():
                self.store.db.set_meta(meta_keys.PUBLISHED, key)
                self.store.db.set_meta(meta_keys.PUBLISH_FAILED, None)
                self.store.db.write_event("published", **data)
            return
        if outcome.generation != self._failed_generation:
            self._backoff.reset()
        self._failed_generation = outcome.generation
        wait = self._backoff.record_failure()
        with self.store.db.transaction():
            self.store.db.set_meta(meta_keys.PUBLISH_FAILED, outcome.reason)
            data |= {"reason": outcome.reason, "retry_seconds": wait}
            self.store.db.write_event("publish_failed", **data)


class _PublishAttempt(threading.Thread):
    """An attempt in a thread; `outcome` may be read when the thread has ended."""

    def __init__(self, config: PublishConfig, home: Home, generation: int, withdraw: bool) -> None:
        super().__init__(name="publish", daemon=True)
        self.config, self.home, self.generation, self.withdraw = config, home, generation, withdraw
        self.outcome = PublishOutcome(generation, reason="it ended unexpectedly")
        self._stop_requested = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._start_lock = threading.Lock()  # no child or pause starts after a stop request
        self._may_be_paused = False  # whether we may have paused a server

    def request_stop(self) -> None:
        """End soon: start no further step, and terminate the child process."""
        with self._start_lock:
            self._stop_requested.set()
            if self._child is not None:
                self._child.terminate()

    def release_server(self) -> None:
        """Resume the server that this attempt may have paused, and cannot resume itself."""
        if self._may_be_paused and self.config.vllm is not None:
            with suppress(KeditError):  # the next process tries again, and resumes it then
                resume_server(self.config.vllm, tries=1)

    def run(self) -> None:
        try:
            self.outcome = self._withdraw_adapters() if self.withdraw else self._publish_export()
        except KeditError as error:
            self.outcome = PublishOutcome(self.generation, reason=str(error))
        except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            self.outcome = PublishOutcome(self.generation, reason=reason)

    def _publish_export(self) -> PublishOutcome:
        export = self._run_export()
        path, generation = str(export["path"]), int(export["manifest"]["generation"])
        self._run_command(path, generation)
        self._notify_server(path)
        # Not before servers have the new one.
        prune_exports(Path(path), self.config.keep, self._unload_adapters)
        return PublishOutcome(generation, path)

    def _withdraw_adapters(self) -> PublishOutcome:
        """Unload all adapters of this home, since no fact is in the weights."""
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
        # -P: modules are not searched for in the current folder.
        command = [sys.executable, "-P", "-m", "kedit_daemon", "--home", str(self.home.root)]
        command += ["export", str(self.config.kind), str(self._export_folder), "--json"]
        return json.loads(self._run_child(command, {}, EXPORT_SECONDS))

    def _run_command(self, path: str, generation: int) -> None:
        if self.config.command:
            name = Path(path).name
            variables = {"KEDIT_EXPORT": path, "KEDIT_GENERATION": str(generation)}
            variables["KEDIT_NAME"] = name
            self._run_child(self.config.command, variables, COMMAND_SECONDS)

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

    def _run_child(self, command: list[str], variables: Mapping[str, str], seconds: float) -> bytes:
        """Run a child process and return its output; KeditError with its error text if it fails."""
        # Files, not pipes: a server that the command has started may keep them open.
        with TemporaryFile() as output, TemporaryFile() as errors:
            with self._start_lock:
                self._check_not_stopping()
                self._child = child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=errors,
                    env=os.environ | variables,
                )
            with child:
                try:
                    if not variables:  # the export: editing goes first
                        os.setpriority(os.PRIO_PROCESS, child.pid, EXPORT_NICENESS)
                    child.wait(seconds)
                finally:
                    child.kill()
            output.seek(0), errors.seek(0)
            if child.returncode:
                raise KeditError(_extract_error(child, errors.read()), code="publish")
            return output.read()


def _extract_error(child: "subprocess.Popen[bytes]", stderr: bytes) -> str:
    lines = stderr.decode(errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("error[")] or lines[-1:]
    why = " ".join(errors) or f"exit code {child.returncode}"
    program = child.args[0] if isinstance(child.args, list) else child.args
    return f"{Path(str(program)).name}: {why[:MAX_ERROR_CHARS]}"
