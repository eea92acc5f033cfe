"""What goes to stderr."""

import logging
import sys
from collections.abc import Iterator

import pytest

from kedit_daemon.logs import CHATTY, on_terminal, set_up


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Logger]:
    """The root logger as a new process has it."""
    logger = logging.getLogger()
    level = logger.level
    levels = {name: logging.getLogger(name).level for name in CHATTY}
    monkeypatch.setattr(logger, "handlers", [])
    yield logger
    logger.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)


@pytest.mark.parametrize(("environ", "dated"), [({}, True), ({"JOURNAL_STREAM": "8:1"}, False)])
def test_the_journal_has_its_own_clock(
    root: logging.Logger,
    capsys: pytest.CaptureFixture[str],
    environ: dict[str, str],
    dated: bool,
) -> None:
    set_up(False, environ)
    logging.getLogger("kedit").info("hello")
    logging.getLogger("kedit").debug("not this")
    logging.getLogger("uvicorn.error").info("nor this")
    said = capsys.readouterr().err
    assert said.endswith("INFO hello\n") and said.count("\n") == 1
    assert (said != "INFO hello\n") is dated


def test_debug_tells_everything(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    set_up(True, {"JOURNAL_STREAM": "8:1"})
    logging.getLogger("uvicorn").debug("this too")
    assert capsys.readouterr().err == "DEBUG this too\n"


def test_progress_is_shown_on_a_terminal_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert list(on_terminal("measuring")(["a", "b"])) == ["a", "b"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert list(on_terminal("measuring")(["a", "b"])) == ["a", "b"]
    assert "measuring" in capsys.readouterr().err
