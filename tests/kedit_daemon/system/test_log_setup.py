"""What goes to stderr."""

import os
import subprocess
import sys

import pytest

from kedit_daemon.system.log_setup import make_progress_bar

JOURNAL = {"JOURNAL_STREAM": "8:1"}


def said(debug: bool, environ: dict[str, str]) -> str:
    """By a process of its own: a log is set up once in each."""
    script = (
        "import logging\nfrom kedit_daemon.system.log_setup import configure_logging\n"
        f"configure_logging({debug}, {environ})\n"
        "logging.getLogger('kedit').info('hello')\n"
        "logging.getLogger('uvicorn.error').debug('more')"
    )
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, capture_output=True, text=True, env=dict(os.environ), check=True
    ).stderr


def test_the_journal_has_its_own_clock() -> None:
    assert said(False, JOURNAL) == "INFO hello\n"
    dated = said(False, {})
    assert dated.endswith(" INFO hello\n") and dated[:2] == "20"


def test_debug_tells_everything() -> None:
    assert said(True, JOURNAL) == "INFO hello\nDEBUG more\n"


def test_progress_is_shown_on_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(make_progress_bar("measuring")(["a", "b"])) == ["a", "b"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(make_progress_bar("measuring")(["a", "b"])) == ["a", "b"]
    assert "measuring" in capsys.readouterr().err
