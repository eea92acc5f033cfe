import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import called, make_home

from kedit_daemon.config import Config, load_config
from kedit_daemon.home import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "home")


def test_init_makes_a_home_that_stays(tmp_path: Path) -> None:
    home = Home(tmp_path / "new")
    result = called(home, "init")
    assert (result.exit_code, result.stdout) == (0, f"{home.root}\n")
    assert load_config(home.root, {}) == Config()
    assert home.inbox_folder.is_dir()
    assert "What changed today" in home.review_file.read_text()
    home.config_file.write_text("device = 'cpu'\n")
    home.review_file.write_text("mine")
    assert called(home, "init").exit_code == 0
    assert home.review_file.read_text() == "mine"
    assert home.config_file.read_text() == "device = 'cpu'\n"
    other = called(home, "init", "--model", "other")
    assert (other.exit_code, "hint: change `model` in it" in other.stderr) == (1, True)


def test_init_with_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_folder: Callable[[str], Path]
) -> None:
    shutil.copytree(model_folder("llama"), tmp_path / "mödel")
    monkeypatch.chdir(tmp_path)
    for number, (model, wanted) in enumerate(
        [("mödel", str(tmp_path / "mödel")), ("org/name", "org/name"), ('a"b', 'a"b')]
    ):
        home = Home(tmp_path / str(number))
        assert called(home, "init", "--model", model).exit_code == 0
        assert load_config(home.root, {}).model == wanted
    for bad in ("", "a\x7f"):
        assert called(Home(tmp_path / "x"), "init", "--model", bad).exit_code == 2
    assert not (tmp_path / "x").exists()


def test_run_refuses_bad_settings(home: Home, tmp_path: Path) -> None:
    home.config_file.write_text("[inbox]\nsettle = 1\n")
    result = called(home, "run")
    assert result.exit_code == 78
    assert "hint: did you mean settle_seconds?" in result.stderr
    assert called(Home(tmp_path / "none"), "run").exit_code == 78
