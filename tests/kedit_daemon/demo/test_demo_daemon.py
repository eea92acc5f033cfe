"""A daemon of the demo: it has the settings that it is given, and runs our own code."""

import subprocess
from pathlib import Path

import pytest

from kedit_daemon.config import Config, RoutingConfig, StabilityConfig, load_config
from kedit_daemon.demo.demo_daemon import DemoDaemon
from memory.errors import KeditError


def test_the_settings_are_the_default_but_for_those_given(tmp_path: Path) -> None:
    real = DemoDaemon(tmp_path / "real", "smollm2", {})
    assert load_config(real.home.root, {}) == Config(model="smollm2")
    own = {"direct_facts": 1, "confident_revert": 0.5}
    small = DemoDaemon(tmp_path / "small", "shipped", own)
    wanted = Config(
        routing=RoutingConfig(direct_facts=1), stability=StabilityConfig(confident_revert=0.5)
    )
    assert load_config(small.home.root, {}) == wanted


def test_a_key_that_is_no_setting_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeditError, match="no sympathy_warn"):
        DemoDaemon(tmp_path / "home", "shipped", {"sympathy_warn": 0.5})


def test_packages_in_the_folder_of_the_caller_are_not_taken(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/__init__.py").write_text("raise SystemExit('not ours')")
    daemon = DemoDaemon(tmp_path / "home", "shipped", {})
    command = [*daemon.command_line, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
