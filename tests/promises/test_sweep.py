"""A crash at any system call loses no fact, does nothing twice, and leaves nothing lying about.

One life of some facts is lived part by part. In each part the daemon is killed at the first, the
second, … call of each kind, and started again; the end must be that of a life without a crash.
`--whole` tries every call of every part (of the writes of pages, each 7th); otherwise those on the
way of one file are tried, and a sample.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from durability import faults
from paths import ROOT, TESTS
from promise_table import Tally
from sweep_life import PARTS
from sweep_process import CALLS

pytestmark = pytest.mark.timeout(7200)
# Claimed, kept, put away: each of them always, or each second, since two follow each other.
WAY = {"renameat": 1, "fsync": 2, "fdatasync": 1}
# While the database was made; between the end of a fact and that of its shard; between a fact that
# supersedes and the weights without the older one; in the middle of a backup.
ONCE = {
    "first": ("pwrite64", 17),
    "flush": ("fdatasync", 6),
    "mixed": ("renameat", 5),
    "back": ("fdatasync", 5),
}
# Pages of the database are written in runs, and no order among them is relied on: a sample will do.
STEP = {"pwrite64": 7}
TWICE, TWICE_WHOLE = 2, 60
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
    command = [sys.executable, str(TESTS / "support" / "sweep_process.py"), str(folder)]
    pipe = subprocess.PIPE
    with (folder / "errors").open("wb") as log:
        process = subprocess.Popen(
            command, env=environ, stdin=pipe, stdout=pipe, stderr=log, text=True
        )
        with process:
            yield Sweep(process, folder / "errors")
            assert process.stdin is not None
            process.stdin.close()  # the end of its orders


class Kills:
    """Kills in one part: counted, and what came of them."""

    def __init__(self, sweep: Sweep, part: str, tally: Tally) -> None:
        self.sweep, self.part, self.tally = sweep, part, tally
        self.calls: dict[str, int] = sweep.order(part)["calls"]
        self.bad: list[str] = []

    def at(self, *calls: tuple[str, int]) -> int:
        """Kill there, at each further one while it recovers from the one before; how many fired."""
        done = self.sweep.order(self.part, *calls)
        found = [f"{self.part}, {calls}: {what}" for what in done["bad"]]
        self.tally.tried(kills=done["fired"], bad=bool(found))
        self.bad += found
        return int(done["fired"])

    def at_every(self, call: str) -> None:
        """At the first, the second, … until there is no such call any more; at each 7th write."""
        most, step = self.calls[call], STEP.get(call, 1)
        number = 1
        while number <= most + 9 and self.at((call, number)):
            number += step
        assert most < number <= most + step, f"{call} came {most} times, not {number - step}"


@pytest.mark.parametrize("call", WAY)
def test_a_kill_on_the_way_of_a_file(call: str, sweep: Sweep, tally: Tally) -> None:
    kills = Kills(sweep, "batch", tally)
    for number in range(WAY[call], kills.calls[call] + 1, WAY[call]):
        if not kills.bad:
            assert kills.at((call, number))
    assert not kills.bad, "\n".join(kills.bad)


@pytest.mark.parametrize("part", ONCE)
def test_a_kill_that_ended_badly_once(part: str, sweep: Sweep, tally: Tally) -> None:
    kills = Kills(sweep, part, tally)
    assert kills.at(ONCE[part])
    assert not kills.bad, "\n".join(kills.bad)


@pytest.mark.parametrize("part", PARTS)
def test_a_kill_at_any_call(part: str, sweep: Sweep, whole: bool, tally: Tally) -> None:
    kills = Kills(sweep, part, tally)
    if whole:
        for call in kills.calls:
            kills.at_every(call)
    else:
        points = [(call, n) for call, most in kills.calls.items() for n in range(1, most + 1)]
        assert kills.at(random.Random(f"{SEED} {part}").choice(points))
    assert not kills.bad, "\n".join(kills.bad)


def test_a_kill_while_it_recovers(sweep: Sweep, whole: bool, tally: Tally) -> None:
    draw, bad = random.Random(SEED), list[str]()
    for _ in range(TWICE_WHOLE if whole else TWICE):
        kills = Kills(sweep, draw.choice([*PARTS]), tally)
        calls = draw.choices([*kills.calls], k=2)
        kills.at(*((call, draw.randint(1, kills.calls[call])) for call in calls))
        bad += kills.bad
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
