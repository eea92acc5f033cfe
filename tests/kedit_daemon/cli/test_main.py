import os
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from command_line import EYRE, ROOT, called, make_home, on_terminal, process, read

from kedit_daemon.cli.main import COMMAND_PATHS, cli
from kedit_daemon.home import Home

HEAVY = ("torch", "pydantic", "rich", "sqlite_utils", "apscheduler", "http.client")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "home")


def every_command() -> Iterator[tuple[str, click.Command]]:
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {sub}", c) for sub, c in command.commands.items())


@pytest.mark.parametrize(("name", "command"), list(every_command()))
def test_every_command_has_help_with_an_example(name: str, command: click.Command) -> None:
    result = called(None, *name.split(), "--help")
    assert result.exit_code == 0
    assert "Example:\n" in result.stdout
    assert f"kedit-daemon {name}" in result.stdout or "--home" in result.stdout
    for parameter in command.params:
        assert isinstance(parameter, click.Argument) or getattr(parameter, "help", None), parameter


def test_the_commands_of_the_contract() -> None:
    wanted = "init run submit status facts show ask flush audit consolidate revert dismiss log"
    wanted += " calibrate export backup restore bench doctor demo completion man"
    assert list(COMMAND_PATHS) == wanted.split()
    assert {"log verify", "log export"} < {name for name, _ in every_command()}


def test_help_and_version() -> None:
    assert "Exit codes: 0 done" in called(None, "-h").stdout
    assert re.fullmatch(r"kedit-daemon \S.*\n", called(None, "--version").stdout)


@pytest.mark.parametrize(
    ("words", "error", "hint"),
    [
        ("stauts", "no such command 'stauts'.", "did you mean status? see kedit-daemon --help"),
        ("xyzzy", "no such command 'xyzzy'.", "see kedit-daemon --help"),
        (
            "log verfy",
            "no such command 'verfy'.",
            "did you mean verify? see kedit-daemon log --help",
        ),
        (
            "log --sinse 2h",
            "no such option '--sinse'.",
            "did you mean --since? see kedit-daemon log --help",
        ),
        ("--hom x", "no such option '--hom'.", "did you mean --home? see kedit-daemon --help"),
        ("show", "missing argument 'ID'.", "see kedit-daemon show --help"),
    ],
)
def test_wrong_usage_is_an_error_and_a_hint(words: str, error: str, hint: str) -> None:
    result = called(None, *words.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error[usage]: {error}\nhint: {hint}\n"


def test_the_home_comes_from_the_environment(home: Home) -> None:
    result = called(None, "facts", "--json", env={"KEDIT_HOME": str(home.root)})
    assert len(read(result)) == 3


def test_an_error_says_what_and_what_to_do(tmp_path: Path) -> None:
    result = called(Home(tmp_path / "none"), "facts")
    assert result.exit_code == 1
    assert result.stdout == ""
    database = tmp_path / "none/state/kedit.db"
    wanted = f"error[no-home]: there is no database {database}\nhint: kedit-daemon init\n"
    assert result.stderr == wanted


def test_only_debug_shows_tracebacks(home: Home) -> None:
    with sqlite3.connect(home.database_file) as conn:
        conn.execute("UPDATE facts SET record = 'no JSON'")
    conn.close()
    result = called(home, "show", EYRE.id)
    assert result.exit_code == 1
    assert result.stderr.startswith("error[unexpected]: JSONDecodeError: ")
    assert result.stderr.endswith("\nhint: run with --debug\n")
    assert len(result.stderr.splitlines()) == 2
    loud = called(home, "--debug", "show", EYRE.id)
    assert (loud.exit_code, "Traceback" in loud.stderr) == (1, True)
    known = called(home, "--debug", "show", "nothing")
    assert "Traceback" in known.stderr


def test_a_reader_that_has_gone_is_no_error(home: Home) -> None:
    first, second = os.pipe()
    os.close(first)
    child = process(home, "log", stdout=second, stderr=subprocess.PIPE)
    os.close(second)
    _, stderr = child.communicate()
    assert stderr == b""


def test_colour_is_for_terminals(home: Home) -> None:
    code, seen = on_terminal(home, "facts")
    assert (code, "\x1b[" in seen) == (0, True)
    _, seen = on_terminal(home, "facts", NO_COLOR="1")
    assert "\x1b" not in seen
    assert "\x1b" not in called(home, "facts").stdout


def test_status_is_quick_and_imports_nothing_heavy(home: Home) -> None:
    code = (
        "import sys, atexit; from kedit_daemon.cli.main import main;"
        f"atexit.register(lambda: print([m for m in {HEAVY} if m in sys.modules]));"
        f"sys.argv[1:] = ['--home', {str(home.root)!r}, 'status']; main()"
    )
    seen = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=False)
    assert (seen.returncode, seen.stderr) == (3, b"")
    assert seen.stdout.splitlines()[-1] == b"[]"

    def measure_least(start: Callable[[], subprocess.Popen[bytes]]) -> float:
        """Seconds of the processor: other work adds to them, and takes nothing away."""
        seconds = []
        for _ in range(5):
            child = start()
            _, _, usage = os.wait4(child.pid, 0)
            child.returncode = 0
            seconds.append(usage.ru_utime + usage.ru_stime)
        return min(seconds)

    needed = [sys.executable, "-c", "import click, json, sqlite3"]
    least = measure_least(lambda: subprocess.Popen(needed))
    spent = measure_least(lambda: process(home, "status", stdout=subprocess.DEVNULL))
    assert spent < 4 * least


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU's OpenMP tells its settings")
def test_torch_does_not_spin_while_it_waits_for_its_threads() -> None:
    code = (
        "import sys\n"
        "from kedit_daemon.cli.main import main\n"
        "sys.argv[1:] = ['--version']\n"
        "try:\n    main()\nexcept SystemExit:\n    import torch\n"
        "torch.set_num_threads(2)\n"
    )
    environ = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    child = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environ, "OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        check=True,
    )
    assert b"GOMP_SPINCOUNT = '0'" in child.stderr
