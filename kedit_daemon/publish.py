"""After a switch of the generation: export it, and tell those who serve it.

The work is done in a thread, most of it in a child process, so that the edit loop goes on; the loop
looks in, writes down what came of it, and begins again where something failed.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from kedit_daemon.config import PublishConfig
from kedit_daemon.home import Home
from kedit_daemon.vllm import load_adapter, reload_weights
from memory.errors import KeditError
from memory.ledger import canonical
from memory.store import Store

PUBLISHED = "published"  # in the store's meta: what was last published, and how
RETRY_SECONDS, LONGEST_RETRY_SECONDS = 60.0, 3600.0
COMMAND_SECONDS = 600.0
EXPORT_SECONDS = 3600.0
STOP_SECONDS = 30.0  # for a server that was told to pause to be told to go on
NICENESS = 10  # of the export; not of the command, which may start a server
LAST_WORDS = 500  # characters of what a child complains about


@dataclass(frozen=True)
class Outcome:
    """What came of publishing: the generation and its folder, or why not."""

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
        self.config, self.home, self.store, self.monotonic = config, home, store, monotonic
        self._work: _Work | None = None
        self._failed = (0, 0)  # the generation that failed last, and how often in a row
        self._again = 0.0  # when it is tried again

    def look(self) -> None:
        """Take note of what has been done, and begin what is due. Never waits."""
        if self._work is not None:
            if self._work.is_alive():
                return
            self._note(self._work.outcome)
            self._work = None
        active = self.store.active_generation()
        if (
            self.config.kind is None
            or not active
            or self._key(active) == self.store.meta(PUBLISHED)
        ):
            return
        if active != self._failed[0] or self.monotonic() >= self._again:
            self._work = _Work(self.config, self.home, active)
            self._work.start()

    def stop(self) -> None:
        """End what is under way; what is not finished is begun again by the next process."""
        if self._work is None:
            return
        self._work.end()
        self._work.join(STOP_SECONDS)
        if not self._work.is_alive() and not self._work.outcome.reason:
            self._note(self._work.outcome)
        self._work = None

    def _key(self, generation: int) -> str:
        """A change of the settings, too, is something to publish."""
        return canonical([generation, self.config.model_dump(exclude={"keep"})])

    def _note(self, outcome: Outcome) -> None:
        told: dict[str, Any] = {"generation": outcome.generation, "export": self.config.kind}
        if not outcome.reason:
            self._failed = (0, 0)
            with self.store.transaction():
                self.store.set_meta(PUBLISHED, self._key(outcome.generation))
                self.store.event("published", **told, path=outcome.path)
            return
        generation, times = self._failed
        times = times + 1 if generation == outcome.generation else 1
        wait = min(RETRY_SECONDS * 2 ** (times - 1), LONGEST_RETRY_SECONDS)
        self._failed, self._again = (outcome.generation, times), self.monotonic() + wait
        with self.store.transaction():
            self.store.event("publish_failed", **told, reason=outcome.reason, retry_seconds=wait)


class _Work(threading.Thread):
    """One attempt; `outcome` may be read when it has ended."""

    def __init__(self, config: PublishConfig, home: Home, generation: int) -> None:
        super().__init__(name="publish", daemon=True)
        self.config, self.home, self.generation = config, home, generation
        self.outcome = Outcome(generation, reason="it ended unexpectedly")
        self._ending = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._starting = threading.Lock()  # no child may start once it is to end

    def end(self) -> None:
        """Let it end soon: no further step is begun, and a child is told to end."""
        with self._starting:
            self._ending.set()
            if self._child is not None:
                self._child.terminate()

    def run(self) -> None:
        try:
            made = self._export()
            path, generation = str(made["path"]), int(made["manifest"]["generation"])
            self._tell(path, generation)
            self.outcome = Outcome(generation, path)
        except KeditError as error:
            self.outcome = Outcome(self.generation, reason=str(error))
        except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
            self.outcome = Outcome(self.generation, reason=f"{type(error).__name__}: {error}")

    def _export(self) -> Any:
        command = [sys.executable, "-m", "kedit_daemon.cli", "--home", str(self.home.root)]
        command += ["export", str(self.config.kind), os.path.expanduser(str(self.config.folder))]
        command += ["--keep", str(self.config.keep), "--json"]
        return json.loads(self._call(command, {}, EXPORT_SECONDS))

    def _tell(self, path: str, generation: int) -> None:
        name = Path(path).name
        if self.config.command:
            told = {
                "KEDIT_EXPORT": path,
                "KEDIT_GENERATION": str(generation),
                "KEDIT_NAME": name,
            }
            self._call(self.config.command, told, COMMAND_SECONDS)
        if self.config.vllm is None or self._ending.is_set():
            return
        if self.config.kind == "lora":
            load_adapter(self.config.vllm, name, path)
        else:
            reload_weights(self.config.vllm, path)

    def _call(self, command: list[str], told: Mapping[str, str], seconds: float) -> bytes:
        """What a child process prints; a KeditError with its last words when it fails."""
        # Files, not pipes: a server that the command has started may keep them open.
        with TemporaryFile() as said, TemporaryFile() as complaint:
            with self._starting:
                if self._ending.is_set():
                    raise KeditError("the daemon is stopping", code="stopping")
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
                        os.setpriority(os.PRIO_PROCESS, child.pid, NICENESS)  # editing goes first
                    child.wait(seconds)
                finally:
                    child.kill()
            said.seek(0), complaint.seek(0)
            if child.returncode:
                raise KeditError(_last_words(child, complaint.read()), code="publish")
            return said.read()


def _last_words(child: "subprocess.Popen[bytes]", complaint: bytes) -> str:
    lines = complaint.decode(errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("error:")] or lines[-1:]
    why = " ".join(errors) or f"exit code {child.returncode}"
    program = child.args[0] if isinstance(child.args, list) else child.args
    return f"{Path(str(program)).name}: {why[:LAST_WORDS]}"
