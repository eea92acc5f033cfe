import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from command_line import called, make_home, on_terminal, read
from tiny_models import CITIES, save_model

from kedit_daemon.editing.model_loading import load_model
from kedit_daemon.home import Home
from kedit_daemon.system.lock import hold_lock
from policies.edit_site import SITE_FILE, make_start_site


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home without facts on a tiny model; what is measured of its text stays between tests."""
    folder = tmp_path_factory.mktemp("calibrated")
    save_model("llama", folder / "model", num_hidden_layers=3)
    home = Home(folder / "home")
    home.create_folders()
    home.config_file.write_text(f'model = "{folder / "model"}"\ndevice = "cpu"\n')
    return home


@pytest.fixture(scope="module")
def pilot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records: list[dict[str, Any]] = [
        {
            "subject": f"country {n}",
            "prompt": "The seat of {} is",
            "target": CITIES[n],
            "paraphrases": ["It rained for most of the morning. The seat of {} is"],
            "neighbours": [{"prompt": p} for p in ("Nothing", "He said that", "1 2 3 4")],
        }
        for n in range(2)
    ]
    path = tmp_path_factory.mktemp("pilot") / "pilot.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def files(home: Home) -> set[str]:
    return {path.name for path in home.state_folder.rglob("*") if path.is_file()} - {
        home.lock_file.name
    }


def test_a_calibration_is_kept_in_the_home_and_used(home: Home, pilot: Path) -> None:
    path = home.state_folder / SITE_FILE
    path.unlink(missing_ok=True)
    given = ["--pilot", str(pilot), "--facts", "2", "--false-routes", "0.05"]
    result = called(home, "calibrate", *given, "--json")
    assert result.exit_code == 0
    told = [line.split("s  ", 1)[1] for line in result.stderr.splitlines()]
    assert told[0] == "statistics of all layers" and told[-1] == "end gate"
    assert any(line.startswith("screening: subject 0") for line in told)
    assert not list(home.state_folder.glob("calibration*"))
    said, kept = read(result), json.loads(path.read_text())
    assert kept["evidence"]["end_gate"]["false_routes"] == pytest.approx(0.05, abs=1e-3)
    assert said["written"] == str(path)
    assert {"site": said["site"], "evidence": said["evidence"]} == kept
    assert kept["evidence"]["pilot_file"] == str(pilot)
    assert kept["evidence"]["at"].endswith("Z")
    model = kept["evidence"]["model"]
    loaded = load_model(model, "cpu", home.state_folder, iter)
    assert json.loads(json.dumps(asdict(loaded.site))) == kept["site"]
    assert loaded.site != make_start_site("llama", 3)


def test_a_dry_run_shows_the_candidates_and_writes_nothing(home: Home, pilot: Path) -> None:
    before = files(home)
    result = called(home, "calibrate", "--pilot", str(pilot), "--facts", "2", "--dry-run")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (0, "dry run: nothing written")
    assert files(home) == before
    head, *lines = result.stdout.splitlines()
    at = next(n for n, line in enumerate(lines) if line.startswith("* chosen"))
    rows, (summary, norm, activation, perplexity, agreement, *table, gate) = lines[:at], lines[at:]
    assert head.split()[:4] == ["STAGE", "SUBJECT", "END", "prior"]
    assert {row[2:].split()[0] for row in rows} >= {"screening", "halving", "final", "start"}
    assert any(row.startswith("*") for row in rows)
    assert summary == f"* chosen, of {len(rows)}"
    assert norm.startswith("norm limits: warn 1.") and "revert" in activation
    assert perplexity.startswith("perplexity limits: warn 1.")
    assert agreement.startswith("agreement limits: warn 0.")  # a random model is sure of nothing
    assert table[0].split()[:3] == ["ROUNDED", "TO", "agreement"]
    assert [row.split()[0] for row in table[1:]] == ["8", "6", "5"]
    assert {row.split()[3] for row in table[1:]} == {"-"}
    assert gate.startswith("end gate: 0.") and "0.08% of 1274 pairs" in gate


def test_a_home_that_a_daemon_holds_is_left_alone(home: Home, pilot: Path) -> None:
    with hold_lock(home.lock_file):
        result = called(home, "calibrate", "--pilot", str(pilot))
    assert (result.exit_code, "another daemon" in result.stderr) == (75, True)


def test_a_home_in_use_is_refused(tmp_path: Path, pilot: Path) -> None:
    home = make_home(tmp_path / "home")
    result = called(home, "calibrate", "--pilot", str(pilot), "--dry-run")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "facts in the weights" in result.stderr and "hint: calibrate a new home" in result.stderr


def test_what_cannot_be_measured_is_refused(home: Home, tmp_path: Path) -> None:
    assert called(home, "calibrate", "--pilot", str(tmp_path / "none")).exit_code == 2
    assert called(home, "calibrate", "--facts", "0").exit_code == 2
    assert called(home, "calibrate", "--false-routes", "0").exit_code == 2
    assert called(home, "calibrate", "--minutes", "0").exit_code == 2
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"subject": "Oslo"}\n')
    result = called(home, "calibrate", "--pilot", str(broken))
    assert (result.exit_code, "broken.jsonl:1: " in result.stderr) == (1, True)
    assert called(Home(tmp_path / "no home"), "calibrate").exit_code == 78


def test_a_bar_moves_on_a_terminal(home: Home, pilot: Path) -> None:
    code, seen = on_terminal(
        home, "calibrate", "--pilot", str(pilot), "--facts", "2", COLUMNS="120"
    )
    assert (code, "written: " in seen) == (0, True)
    assert any(stage in seen for stage in ("screening: ", "halving: ", "final: "))
