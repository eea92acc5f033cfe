"""What goes to stderr."""

import itertools
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


def test_progress_is_a_bar_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(make_progress_bar("measuring")(["a", "b"])) == ["a", "b"]
    assert "measuring" in capsys.readouterr().err


def test_progress_is_told_elsewhere_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    times = itertools.count(0.0, 2.0)
    assert list(make_progress_bar("measuring", lambda: next(times))(range(10))) == list(range(10))
    assert caplog.messages == [f"measuring: {n} % done" for n in (20, 50, 80)]
    caplog.clear()
    assert list(make_progress_bar("measuring", lambda: 0.0)(range(10))) == list(range(10))
    assert caplog.messages == []
