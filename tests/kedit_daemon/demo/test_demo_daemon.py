"""A daemon of the demo: its settings are those of the story, and it runs our own code."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from kedit_daemon.config import Config, StabilityConfig, load_config
from kedit_daemon.demo.demo_daemon import DemoDaemon
from kedit_daemon.demo.story import load_story
from memory.errors import KeditError


def test_the_settings_are_the_default_but_for_what_the_story_says(tmp_path: Path) -> None:
    small = DemoDaemon(tmp_path / "small", load_story("shipped"))
    wide = StabilityConfig(confident_warn=0.25, confident_consolidate=0.35, confident_revert=0.5)
    assert load_config(small.home.root, {}) == Config(stability=wide)
    real = DemoDaemon(tmp_path / "real", load_story("smollm2"))
    assert load_config(real.home.root, {}) == Config(model="smollm2")


def test_a_limit_that_is_no_setting_is_refused(tmp_path: Path) -> None:
    story = replace(load_story("shipped"), stability={"sympathy_warn": 0.5})
    with pytest.raises(KeditError, match="no sympathy_warn"):
        DemoDaemon(tmp_path / "home", story)


def test_packages_in_the_folder_of_the_caller_are_not_taken(tmp_path: Path) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/__init__.py").write_text("raise SystemExit('not ours')")
    daemon = DemoDaemon(tmp_path / "home", load_story("shipped"))
    command = [*daemon.command_line, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
