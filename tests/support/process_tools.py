"""What the tests of promises share that need a real daemon: a home for it, its start and end."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from editing_home import LOOSE, seat
from tiny_models import CITIES

from kedit_daemon.home import Home
from memory.db import queries
from memory.errors import KeditError
from memory.facts import Fact

FACTS = [seat(n, CITIES[n % len(CITIES)]) for n in range(12)]
CONFIG = """\
model = {model}
device = "cpu"
[inbox]
settle_seconds = 0.0
rescan_seconds = 0.2
[routing]
direct_facts = 4
[side]
steps = 300
[stability]
{limits}
"""


def make_home(root: Path, model: Path) -> Home:
    home = Home(root)
    home.create_folders()
    limits = "\n".join(f"{name} = {value}" for name, value in LOOSE["stability"].items())
    text = CONFIG.format(model=json.dumps(str(model)), limits=limits)
    home.config_file.write_text(text, encoding="utf-8")
    return home


def drop(home: Home) -> None:
    lines = [json.dumps(record(fact)) + "\n" for fact in FACTS]
    (home.inbox_folder / "facts.jsonl").write_text("".join(lines), encoding="utf-8")


def record(fact: Fact) -> dict[str, Any]:
    near = [{"prompt": n.prompt} for n in fact.neighbours]
    said = {"subject": fact.subject, "prompt": fact.prompt, "target": fact.target}
    return {**said, "neighbours": near}


def start(home: Home) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "kedit_daemon", "--home", str(home.root), "run"]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (home.root / "daemon.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environ)


def starts(home: Home) -> int:
    return int(query(home, "SELECT count(*) FROM events WHERE kind = 'daemon_started'")[0][0])


def query(home: Home, sql: str) -> list[tuple[Any, ...]]:
    """Rows; none where there is no database yet."""
    try:
        connection = queries.open_readonly(home.database_file)
    except KeditError:
        return [(0,)]
    try:
        return [tuple(row) for row in connection.execute(sql)]
    finally:
        connection.close()


def at_rest(home: Home) -> bool:
    states = dict(query(home, "SELECT state, count(*) FROM facts GROUP BY state"))
    return sum(states.values()) == len(FACTS) and "received" not in states


def wait(what: Callable[[], bool], home: Home) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline, (home.root / "daemon.log").read_text()[-2000:]
        time.sleep(0.01)


def started(home: Home) -> "subprocess.Popen[bytes]":
    before = starts(home)
    process = start(home)
    wait(lambda: starts(home) > before or process.poll() is not None, home)
    return process


def finish(home: Home, process: "subprocess.Popen[bytes]") -> None:
    try:
        wait(lambda: at_rest(home), home)
        process.terminate()
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait(60)


def outcome(home: Home) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    facts = query(home, "SELECT id, state, tier, before, after FROM facts ORDER BY id")
    active = "SELECT weights_hash, fact_ids FROM generations ORDER BY id DESC LIMIT 1"
    return facts, query(home, active)
