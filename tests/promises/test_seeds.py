"""Each test of a promise can fail: with a bug put in, it does. The bugs are tried by `--whole`."""

import json
import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
from paths import ROOT, TESTS
from promise_table import Report, Seed

pytestmark = pytest.mark.timeout(280)
LIST = Path(__file__).with_name("bugs.toml")
SECONDS = 240
SEEDING = TESTS / "seeding"


@dataclass(frozen=True)
class Bug:
    """One text of a module, another in its place, and the tests that must see it."""

    name: str
    module: str
    old: str
    new: str
    test: str  # what is tried, as pytest names it, below tests/promises


BUGS = [Bug(**bug) for bug in tomllib.loads(LIST.read_text("utf-8"))["bug"]]
EACH = {bug.name.replace(" ", "-"): bug for bug in BUGS}


def seeded(bug: Bug) -> "subprocess.CompletedProcess[str]":
    """The tests that must see a bug, run with it."""
    environ = dict(os.environ)
    environ["KEDIT_SEED"] = json.dumps([[bug.module, bug.old, bug.new]])
    path = [str(SEEDING), environ.get("PYTHONPATH", "")]
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=short"]
    command += ["-p", "no:cacheprovider", f"tests/promises/{bug.test}"]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, cwd=ROOT, env=environ, text=True, timeout=SECONDS, **output)


@pytest.mark.parametrize("bug", EACH.values(), ids=EACH)
def test_what_a_bug_changes_is_there(bug: Bug, report: Report) -> None:
    text = (ROOT / bug.module.replace(".", "/")).with_suffix(".py").read_text("utf-8")
    assert text.count(bug.old) == 1
    assert (ROOT / "tests/promises" / bug.test.partition("::")[0]).is_file()


@pytest.mark.whole
@pytest.mark.parametrize("bug", EACH.values(), ids=EACH)
def test_a_bug_is_seen(bug: Bug, report: Report) -> None:
    done = seeded(bug)
    # 1: a test has failed. All else would be a run that could not be, which shows nothing.
    caught = done.returncode == 1 and "\nFAILED " in done.stdout
    report.seeds.append(Seed(bug.name, bug.module, bug.test, caught))
    assert caught, done.stdout[-3000:]
