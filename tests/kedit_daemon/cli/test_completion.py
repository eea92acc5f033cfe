import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import EVIL, EYRE, OSLO, ROOT, make_home

from kedit_daemon.home import Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "home")


def offered(home: Home, *words: str) -> dict[str, str]:
    """What bash or fish would get for the last of the words: value -> its help."""
    environ = {
        **os.environ,
        "_KEDIT_DAEMON_COMPLETE": "zsh_complete",
        "COMP_WORDS": " ".join(["kedit-daemon", "--home", str(home.root), *words]),
        "COMP_CWORD": str(len(words) + 2),
    }
    command = [sys.executable, "-m", "kedit_daemon"]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, check=True)
    assert done.stderr == b""
    lines = done.stdout.decode().splitlines()
    return dict(zip(lines[1::3], lines[2::3], strict=True))


def test_ids_are_completed_with_what_they_say(home: Home) -> None:
    found = offered(home, "show", EYRE.id[:4])
    assert found == {EYRE.id: "The country that Lake Eyre lies in is → Australia"}
    assert set(offered(home, "show", "")) == {EYRE.id, OSLO.id, EVIL.id}
    assert set(offered(home, "show", "mi")) == {"mine"}
    assert set(offered(home, "log", "--fact", OSLO.id[:3])) == {OSLO.id}
    # Those that are on the line already are not offered again.
    assert set(offered(home, "revert", EYRE.id, "")) == {OSLO.id, EVIL.id}


def test_what_facts_say_cannot_break_the_list(home: Home) -> None:
    said = offered(home, "show", EVIL.id)[EVIL.id]
    assert said.isprintable()


def test_states_kinds_and_files(home: Home) -> None:
    assert set(offered(home, "facts", "--state", "live")) == {"live-side", "live-weights"}
    kinds = offered(home, "log", "--kind", "fact_re")
    assert set(kinds) == {"fact_received", "fact_rejected", "fact_reverted", "fact_revived"}
    assert kinds["fact_rejected"] == "it was refused"
    for name in ("bad.jsonl", "b $(x)"):
        (home.inbox_folder / "failed" / f"{name}.error.json").write_text("{}")
    assert offered(home, "show", "b") == {"bad.jsonl": "a file that failed"}


@pytest.mark.parametrize("harm", [b"", b"x" * 9_000])
def test_where_nothing_can_be_read_nothing_is_offered(home: Home, harm: bytes) -> None:
    home.database_file.write_bytes(harm)
    assert offered(home, "show", "a") == {}


def test_a_database_of_another_kind_is_passed_over(home: Home) -> None:
    with sqlite3.connect(home.database_file) as conn:
        conn.execute("ALTER TABLE facts RENAME TO others")
    conn.close()
    assert offered(home, "show", "a") == {}


def test_completing_is_quick_and_imports_nothing_heavy(home: Home) -> None:
    code = (
        "import atexit, sys; from kedit_daemon.cli.main import main\n"
        "heavy = ('torch', 'pydantic', 'sqlite_utils', 'numpy')\n"
        "atexit.register(lambda: print([m for m in heavy if m in sys.modules]))\n"
        "main()"
    )
    environ = {**os.environ, "_KEDIT_DAEMON_COMPLETE": "bash_complete", "COMP_CWORD": "4"}
    environ["COMP_WORDS"] = f"kedit-daemon --home {home.root} show "
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, check=True
    )
    assert done.stdout.splitlines()[-1] == b"[]"
    assert f"plain,{EYRE.id}".encode() in done.stdout
