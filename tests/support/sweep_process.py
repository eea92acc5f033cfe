"""A process that lives lives, and is killed in them: `python sweep_process.py FOLDER`.

Starting a daemon costs seconds, most of them for imports. So one process has imported all and has
loaded a model; each life is a fork of it, which strace attaches to before it begins. It reads
orders from stdin, each a line of JSON ([part] or [part, [call, number], ...]), and answers each
with a line.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

from sweep_life import PARTS, Case, Progress, findings, live
from tiny_models import save_model

from kedit_daemon.daemon import loop
from kedit_daemon.editing import model_loading
from kedit_daemon.editing.model_loading import load_model
from kedit_daemon.editing.side_learner import OUTSIDE_LINES

# All by which something is made durable, gets a name or loses it.
CALLS = ("renameat", "fdatasync", "rename", "renameat2", "fsync", "unlink", "unlinkat", "link")
CALLS += ("linkat", "ftruncate", "pwrite64")
WRITES = ("write", "writev", "pwritev")
LAYERS = 3  # enough to edit; each costs time in every life
SECONDS = 60


class Forge:
    """Forks of a process in which everything is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.case = folder, folder / "case"
        self.model = save_model("llama", folder / "model", num_hidden_layers=LAYERS)
        cache = folder / "cache"
        cache.mkdir()
        loaded = load_model(str(self.model), "cpu", cache, iter)
        loaded.opened.resolve_ordinary_inputs(loaded.site.side_layer, OUTSIDE_LINES)
        self.load, self.loaded = loop.load_model, lambda *_, **__: loaded
        model_loading.collect_statistics = lambda *_: (
            loaded.statistics
        )  # what takes long and writes nothing
        self.progress = Progress()
        # How each part finds the home, and leaves it, and by how much the clock is ahead then.
        self.begin: dict[str, tuple[Case, timedelta]] = {}
        self.end: dict[str, tuple[Case, timedelta]] = {}
        self.calm: dict[str, dict[str, Any]] = {}  # what is found where nothing happens

    # Lives ------------------------------------------------------------------------------------

    def calmly(self, part: str) -> dict[str, Any]:
        """Live a part, watched and otherwise left alone, and what comes before it: how often each
        call is made, where all calls are written, and how it ends."""
        if part not in self.calm:
            self._live_calmly(part)
        trace = self.folder / f"trace-{part}"
        calls = Counter(line.partition("(")[0] for line in trace.read_text().splitlines())
        kills = {call: calls[call] for call in CALLS if calls[call]}
        return {"calls": kills, "trace": str(trace), "end": self.calm[part]}

    def _live_calmly(self, part: str) -> None:
        place = list(PARTS).index(part)
        before = list(PARTS)[place - 1] if place else None
        if before is None:
            case, ahead = Case.made(self.folder / "begin"), timedelta()
        else:
            self.calmly(before)
            case, ahead = self.end[before]
        self.begin[part] = case, ahead
        self.progress.set(0, ahead)
        now, trace = case.copied(self.case), self.folder / f"trace-{part}"
        every = ",".join((*CALLS, *WRITES))
        pid = self._lived(now, part, ["-ff", "-y", "-s", "200", "-e", every, "-o", str(trace)])
        Path(f"{trace}.{pid}").rename(trace)  # that of the thread that edits
        self.end[part] = now.copied(self.folder / f"after-{part}"), self.progress.ahead
        self.calm[part] = self._found(now)

    def kill(self, part: str, kills: list[tuple[str, int]]) -> dict[str, Any]:
        """Live a part, killed at the n-th of a call, and again while it recovers if there is more
        than one of them; how many kills fired, and where the end is not that of a calm life."""
        case, ahead = self.begin[part]
        self.progress.set(0, ahead)
        case, fired = case.copied(self.case), 0
        for call, number in kills:
            inject = f"inject={call}:signal=KILL:when={number}"
            if self._lived(case, part, ["-e", f"trace={call}", "-e", inject]):
                break
            fired += 1
        if fired and not self._lived(case, part, []):
            return {"fired": fired, "bad": [f"no life afterwards: {self._log()}"]}
        found = self._found(case)
        wanted = self.calm[part]
        bad = [n for n in wanted if found[n] != wanted[n]]
        return {"fired": fired, "bad": [f"{n}: {_apart(found[n], wanted[n])}" for n in bad]}

    def _found(self, case: Case) -> dict[str, Any]:
        return findings(case) | {"served": json.loads(self._served.read_text())}

    @property
    def _served(self) -> Path:
        return self.folder / "served.json"

    def _log(self) -> str:
        return (self.folder / "log").read_text()[-2000:]

    # Forks ------------------------------------------------------------------------------------

    def _lived(self, case: Case, part: str, strace: list[str]) -> int:
        """Live a part in a fork, under strace if there are words for it: its pid, or 0 if it was
        killed."""
        reader, writer = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(writer)
            self._child(case, part, reader)
        os.close(reader)
        try:
            tracer = _traced(pid, strace) if strace else None
        finally:
            os.close(writer)  # it begins
        deadline = time.monotonic() + SECONDS
        while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
            assert time.monotonic() < deadline, (os.kill(pid, signal.SIGKILL), self._log())
            time.sleep(0.002)
        if tracer is not None:
            tracer.communicate()
        status = os.waitstatus_to_exitcode(ended[1])
        assert status in (0, -signal.SIGKILL), self._log()
        return 0 if status else pid

    def _child(self, case: Case, part: str, begin: int) -> None:
        status = 1
        try:
            log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.read(begin, 1)
            # What is measured of a new model at its first start is written; later nothing is.
            loop.load_model = self.load if part == "first" else self.loaded
            self._served.write_text(json.dumps(live(case, self.model, PARTS[part], self.progress)))
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)


def _apart(found: Any, wanted: Any) -> str:
    """In what they differ; all of it where that is the order."""
    if not isinstance(found, list) or sorted(found) == sorted(wanted):
        return f"{found} and not {wanted}"
    more, less = ([x for x in a if x not in b] for a, b in ((found, wanted), (wanted, found)))
    return f"too much {more}, missing {less}, {len(found)} for {len(wanted)}"


def _traced(pid: int, words: list[str]) -> "subprocess.Popen[bytes]":
    command = ["strace", "-f", "-p", str(pid), *words]
    tracer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert tracer.stderr is not None
    said = tracer.stderr.readline()
    assert b"attached" in said, said
    return tracer


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what anybody prints is no answer
    forge = Forge(Path(sys.argv[1]))
    for line in sys.stdin:
        part, *kills = json.loads(line)
        answer = forge.kill(part, kills) if kills else forge.calmly(part)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
