"""A crash at any system call loses no fact, does nothing twice, and leaves nothing lying about.

One life of some facts is lived part by part. In each part the daemon is killed at the first, the
second, … call of each kind, and started again; the end must be that of a life without a crash.
`--whole` tries every call of every part; otherwise those around one file's way, and a sample.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT
from durability import faults
from promise_table import Tally
from sweep_life import PARTS
from sweep_process import CALLS

pytestmark = [pytest.mark.timeout(7200), pytest.mark.xdist_group("sweep")]
EVERY = {"batch": ("renameat", "fdatasync", "rename")}  # of these all, also without --whole
SAMPLE = 1  # of the other parts
TWICE, TWICE_WHOLE = 3, 100
SEED = 20260101


@dataclass
class Sweep:
    """The process that lives and is killed."""

    process: "subprocess.Popen[str]"
    log: Path

    def order(self, *words: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{json.dumps(words)}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.log.read_text()[-4000:]
        answer: dict[str, Any] = json.loads(line)
        return answer


def tracing(folder: Path) -> str | None:
    """Why nothing can be traced here, if nothing can."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    done = subprocess.run(["strace", "-o", str(folder / "probe"), "true"], capture_output=True)
    return f"strace may not trace: {done.stderr.decode().strip()}" if done.returncode else None


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sweep]:
    folder = tmp_path_factory.mktemp("sweep")
    if why := tracing(folder):
        pytest.skip(why)
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(ROOT / "tests" / "sweep_process.py"), str(folder)]
    pipe = subprocess.PIPE
    with (folder / "errors").open("wb") as log:
        process = subprocess.Popen(
            command, env=environ, stdin=pipe, stdout=pipe, stderr=log, text=True
        )
        with process:
            yield Sweep(process, folder / "errors")
            assert process.stdin is not None
            process.stdin.close()  # the end of its orders


def all_kills(sweep: Sweep, part: str, call: str, most: int, step: Callable[[int], bool]) -> int:
    """Kill at the first, the second, … of a call, until there is no such call any more."""
    number = 1
    while number <= 2 * most + 2 and step(number):
        number += 1
    assert number == most + 1, f"{call} is called {most} times in {part}, and then not so"
    return number


@pytest.mark.parametrize("part", PARTS)
def test_a_kill_at_any_call(part: str, sweep: Sweep, whole: bool, tally: Tally) -> None:
    calls: dict[str, int] = sweep.order(part)["calls"]
    bad: list[str] = []

    def kill(call: str, number: int) -> bool:
        done = sweep.order(part, (call, number))
        found = [f"{part}, {call} {number}: {what}" for what in done["bad"]]
        tally.tried(kills=done["fired"], bad=bool(found))
        bad.extend(found)
        assert whole or not bad, bad
        return bool(done["fired"])

    for call in calls if whole else EVERY.get(part, ()):
        all_kills(sweep, part, call, calls[call], lambda number, call=call: kill(call, number))
    if not whole and part not in EVERY:
        points = [(call, n) for call, most in calls.items() for n in range(1, most + 1)]
        for call, number in random.Random(f"{SEED} {part}").sample(points, SAMPLE):
            assert kill(call, number)
    assert not bad, "\n".join(bad)


def test_a_kill_while_it_recovers(sweep: Sweep, whole: bool, tally: Tally) -> None:
    draw, bad = random.Random(SEED), list[str]()
    for _ in range(TWICE_WHOLE if whole else TWICE):
        part = draw.choice([*PARTS])
        calls: dict[str, int] = sweep.order(part)["calls"]
        first, second = draw.choice([*calls]), draw.choice([*calls])
        kills = (first, draw.randint(1, calls[first])), (second, draw.randint(1, calls[second]))
        done = sweep.order(part, *kills)
        tally.tried(kills=done["fired"], bad=bool(done["bad"]))
        bad += [f"{part}, {kills}: {what}" for what in done["bad"]]
    assert not bad, "\n".join(bad)


def test_the_life_has_everything_in_it(sweep: Sweep) -> None:
    """Every end that a fact can come to by itself or by somebody's wish, and nothing is wrong."""
    seen, kinds = set[str](), set[str]()
    for part in PARTS:
        told = sweep.order(part)
        end = told["end"]
        assert (end["served"], end["chain"]) == ([], "")
        assert not {"chain", "database", "leftovers", "weights"} & {*end["doctor"]}
        seen |= {state for _, state, *_ in end["facts"]}
        kinds |= {kind for _, kind in end["events"]}
        assert set(told["calls"]) <= {*CALLS}
    assert seen == {"live-side", "live-weights", "superseded", "reverted", "expired"}
    assert "fact_duplicate" in kinds
    assert {"home/inbox/failed/mixed.jsonl", "backup/manifest.json"} <= {*end["files"]}


@pytest.mark.parametrize("part", PARTS)
def test_what_has_a_name_outlives_a_power_loss(part: str, sweep: Sweep) -> None:
    trace = Path(sweep.order(part)["trace"]).read_text().splitlines()
    assert faults(trace) == []
