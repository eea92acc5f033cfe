"""Models that no daemon may start with: `run`, `init` and `doctor` say the same, and bind none."""

import json
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from broken_models import REFUSED, make_refused
from command_line import called, read
from forking import ended, forked

from kedit_daemon.config import render_default_config
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


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_is_refused_before_a_home_is_bound_to_it(
    name: str, model_folder: Folder, tmp_path: Path
) -> None:
    model = make_refused(name, model_folder("llama"), tmp_path / "model")
    _, found, remedy = REFUSED[name]

    refused = called(Home(tmp_path / "none"), "init", "--model", str(model))
    check_refusal(refused.exit_code, refused.stderr, found, remedy)
    assert not (tmp_path / "none").exists()

    home = Home(tmp_path / "home")
    home.create_folders()
    home.config_file.write_text(render_default_config(str(model)))
    check_refusal(*run(home), found, remedy)
    assert not bound(home)

    examined = called(home, "doctor", "--json")
    [check] = [c for c in read(examined)["checks"] if c["name"] == "model"]
    assert (examined.exit_code, check["outcome"]) == (1, "failed")
    assert re.search(found, check["detail"])
    assert remedy in check["remedy"]


def test_a_folder_that_is_not_there_is_no_id_on_the_hub(tmp_path: Path) -> None:
    lost = str(tmp_path / "lost")
    refused = called(Home(tmp_path / "none"), "init", "--model", lost)
    check_refusal(refused.exit_code, refused.stderr, f"there is no folder {lost}", "hub")
    assert not (tmp_path / "none").exists()


def test_a_whole_model_is_taken_and_found_well(model_folder: Folder, tmp_path: Path) -> None:
    home, model = Home(tmp_path / "home"), str(model_folder("llama"))
    assert called(home, "init", "--model", model).exit_code == 0
    [check] = [c for c in read(called(home, "doctor", "--json"))["checks"] if c["name"] == "model"]
    assert (check["outcome"], check["detail"]) == ("ok", model)
    assert json.dumps(model) in home.config_file.read_text()
