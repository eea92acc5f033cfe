"""A home of an earlier release is opened, answered from, reverted and restarted.

The archive holds a tiny model and a home with four facts in the weights, three in the side memory
and one reverted, as the release before the modules were sorted into packages left them.
"""

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
from command_line import called, read
from paths import TESTS
from process_tools import query, started, wait

from kedit_daemon.home import Home

pytestmark = pytest.mark.timeout(120)
ARCHIVE = TESTS / "data/home_of_flat_modules.tar.xz"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    home = Home(tmp_path / "home")
    text = home.config_file.read_text("utf-8")
    text = text.replace("MODEL", str(tmp_path / "model"))
    # Its facts have waited for longer than a day by now, and each is to stay in its tier.
    text = text.replace("[routing]\n", "[routing]\nflush_age_seconds = 1e9\n")
    home.config_file.write_text(text, "utf-8")
    return home


def stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    assert process.wait(30) == 0


def ask(home: Home, prompt: str) -> tuple[str, str | None]:
    answer = read(called(home, "ask", prompt, "--json", "--explain"))
    return answer["answer"], answer["fired"][0]["tier"] if answer["fired"] else None


def expected_answers(home: Home) -> dict[str, dict[str, Any]]:
    expected: dict[str, dict[str, Any]] = json.loads(
        (home.root.parent / "expected.json").read_text()
    )
    return expected


def assert_answers(home: Home, reverted: set[str]) -> None:
    for fact_id, fact in expected_answers(home).items():
        answer, tier = ask(home, fact["prompt"])
        if fact_id in reverted or fact["state"] == "reverted":
            assert answer != fact["target"] and tier is None
        else:
            assert (answer, tier) == (fact["target"], fact["tier"])


def test_a_home_of_an_earlier_release_goes_on(home: Home) -> None:
    expected = expected_answers(home)
    of_tier = {fact["tier"]: fact_id for fact_id, fact in expected.items()}
    chosen = {of_tier["weights"], of_tier["side"]}
    process = started(home)
    try:
        wait(lambda: called(home, "ask", "x").exit_code == 0, home)
        status = read(called(home, "status", "--json"))
        assert (status["facts"]["live-weights"], status["facts"]["live-side"]) == (4, 3)
        assert_answers(home, set())
        assert called(home, "revert", *chosen, "--yes").exit_code == 0
        # What no longer holds on the other weights is learned again before it is asked for.
        received = "SELECT count(*) FROM facts WHERE state = 'received'"
        wait(lambda: query(home, received) == [(0,)], home)
        assert_answers(home, chosen)
        stop(process)
        process = started(home)
        wait(lambda: called(home, "ask", "x").exit_code == 0, home)
        assert_answers(home, chosen)
        verified = called(home, "log", "verify")
        assert verified.exit_code == 0 and verified.output.startswith("intact: ")
        doctor = [sys.executable, "-m", "kedit_daemon", "--home", str(home.root), "doctor"]
        assert subprocess.run(doctor, capture_output=True, timeout=60).returncode == 0
    finally:
        process.kill()
        process.wait(30)
