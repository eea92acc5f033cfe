import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import ROOT, called
from tiny_models import CITIES

from kedit_daemon.bench.studies.study import format_study
from kedit_daemon.bench.studies.study_catalog import import_study
from kedit_daemon.bench.table import format_result
from kedit_daemon.editing.generations import Generations
from kedit_daemon.home import Home
from memory.errors import KeditError


@pytest.fixture
def data(tmp_path: Path) -> Path:
    records = [
        {
            "subject": f"country {n}",
            "prompt": "The seat of {} is",
            "target_new": CITIES[n],
            "target_true": CITIES[n - 1],
            "paraphrase_prompts": [f"The seat of the old country {n} is"],
            "neighborhood_prompts": [f"The seat of country {n + 20} is"],
        }
        for n in range(4)
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps([*records, {"subject": "no fact"}]))
    return path


def test_a_run_prints_a_table_and_writes_the_same_as_json(
    data: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model, out = str(model_folder("llama")), tmp_path / "out.json"
    words = ["--limit", "4", "--offset", "1", "--method", "ft", "--baseline", "none", "--seed", "3"]
    result = called(None, "bench", str(data), "--model", model, *words, "--json", str(out))
    assert result.exit_code == 0, result.stderr
    written = json.loads(out.read_text())
    assert result.stdout.splitlines() == list(format_result(written))
    assert (written["model"], written["seed"], written["facts"]) == (model, 3, 3)
    assert (written["skipped"], written["baseline"]["method"]) == (1, "none")
    assert result.stderr.startswith("data.json:1: skipped: ")
    assert "%" not in result.stderr  # no bar off a terminal


def test_a_study_takes_the_place_of_a_method(
    data: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    model, out, picture = str(model_folder("llama")), tmp_path / "out.json", tmp_path / "out.png"
    words = ["--study", "capacity", "--model", model, "--limit", "3", "--seed", "3"]
    files = ["--json", str(out), "--plot", str(picture)]
    result = called(None, "bench", str(data), *words, *files)
    assert result.exit_code == 0, result.stderr
    written = json.loads(out.read_text())
    assert (written["study"], written["model"], written["seed"]) == ("capacity", model, 3)
    assert (written["facts"], written["knee"], written["rows"][-1]["size"]) == (3, 3, 3)
    assert result.stdout.splitlines() == list(format_study(import_study("capacity"), written))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_routing_study_takes_texts(
    data: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    texts, out = tmp_path / "texts.txt", tmp_path / "out.json"
    texts.write_text("It rained.\nThe sun shone.\n")
    words = ["--study", "routing", "--model", str(model_folder("llama")), "--texts", str(texts)]
    result = called(None, "bench", str(data), *words, "--limit", "2", "--json", str(out))
    assert result.exit_code == 0, result.stderr
    written = json.loads(out.read_text())
    assert (written["texts"], written["asked"]["text"]) == ("texts.txt", 2)


@pytest.mark.parametrize(
    "words",
    [
        ["--study", "magic"],
        ["--study", "churn", "--method", "auto"],
        ["--study", "churn", "--baseline", "none"],
        ["--method", "magic"],
        ["--baseline", "magic"],
        ["--batch-size", "0"],
        ["--limit", "0"],
        ["--json", "/nowhere/at/all.json"],
        ["--sweep", "colour"],
        ["--sweep", "batch-size", "--baseline", "none"],
        ["--resume"],
        ["--texts", __file__],
        ["--texts", __file__, "--study", "churn"],
        ["--texts", "/nowhere/at/all.txt", "--study", "routing"],
    ],
)
def test_wrong_usage_is_told_at_once(data: Path, words: list[str]) -> None:
    result = called(None, "bench", str(data), *words)
    assert (result.exit_code, result.stdout) == (2, "")


def test_without_facts_and_without_a_model(data: Path, tmp_path: Path) -> None:
    none = called(None, "bench", str(data), "--offset", "99")
    assert (none.exit_code, none.stderr.splitlines()[1].split(":")[0]) == (1, "hint")
    lost = called(None, "bench", str(data), "--model", str(tmp_path / "none"))
    assert lost.exit_code == 78


def test_a_picture_that_cannot_be_drawn_is_told_before_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    picture = tmp_path / "out.png"
    result = called(None, "bench", str(data), "--model", "nowhere", "--plot", str(picture))
    assert result.exit_code == 1  # not 78: the model was not looked at yet
    assert "matplotlib is not installed" in result.stderr
    assert "hint: pip install 'kedit-daemon[bench]'" in result.stderr


def test_help_imports_nothing_heavy_and_lists_the_methods(tmp_path: Path) -> None:
    code = (
        "import sys, atexit; from kedit_daemon.cli.main import main;"
        "atexit.register(lambda: print([m for m in ('torch', 'pydantic', 'matplotlib')"
        " if m in sys.modules])); sys.argv[1:] = ['bench', '--help']; main()"
    )
    env = os.environ | {"KEDIT_HOME": str(tmp_path)}
    seen = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert seen.stdout.splitlines()[-1] == "[]"
    assert "memit-mass" in seen.stdout and "reference" in seen.stdout


def test_a_run_that_was_cut_off_is_resumed_from_beside_its_json_file(
    data: Path, model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, work = tmp_path / "out.json", tmp_path / "out.json.work"
    home = Home(tmp_path / "home")
    home.create_folders()  # lends its place for what is measured of the model
    words = [str(data), "--model", str(model_folder("llama")), "--batch-size", "2", "--no-policy"]
    words += ["--method", "memit-mass", "--json", str(out)]
    real, taken = Generations.activate_candidate, list[int]()

    def publish(*given: Any) -> int:
        if len(taken) == 1:
            raise KeditError("cut", code="cut")
        taken.append(real(*given))
        return taken[-1]

    with monkeypatch.context() as patch:
        patch.setattr(Generations, "activate_candidate", publish)
        cut = called(home, "bench", *words, "--resume")
    assert (cut.exit_code, out.exists(), work.is_dir()) == (1, False, True)
    other = called(home, "bench", *words, "--resume", "--seed", "3")
    assert other.exit_code == 1 and "another seed" in other.stderr
    done = called(home, "bench", *words, "--resume")
    assert done.exit_code == 0, done.stderr
    assert not work.exists()
    resumed = json.loads(out.read_text())
    assert called(home, "bench", *words).exit_code == 0
    whole = json.loads(out.read_text())
    assert not work.exists()
    for key in ("reliability", "generality", "locality", "retention", "not_edited"):
        assert resumed[key] == whole[key]


def test_a_sweep_runs_every_size_and_takes_memit_mass_unless_told_otherwise(
    data: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    out, words = tmp_path / "out.json", ["--model", str(model_folder("llama"))]
    home = Home(tmp_path / "home")
    home.create_folders()
    words += ["--sweep", "batch-size", "--json", str(out)]
    result = called(home, "bench", str(data), *words, "--no-policy")
    assert result.exit_code == 0, result.stderr
    written = json.loads(out.read_text())
    assert result.stdout.splitlines() == list(format_result(written))
    assert (written["method"], [row["batch_size"] for row in written["sweep"]]) == (
        "memit-mass",
        [1],
    )
    assert called(home, "bench", str(data), *words, "--method", "ft").exit_code == 0
    assert json.loads(out.read_text())["method"] == "ft"


def test_wise_as_published_is_the_reference(
    data: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    words = ["bench", str(data), "--model", str(model_folder("llama")), "--limit", "1", "--paper"]
    out = tmp_path / "out.json"
    result = called(None, *words, "--method", "wise", "--json", str(out))
    assert result.exit_code == 0, result.stderr
    assert json.loads(out.read_text())["method"] == "reference-wise"
    for method in ([], ["--method", "memit"]):
        result = called(None, *words, *method)
        assert (result.exit_code, "--paper goes with --method wise" in result.stderr) == (2, True)
