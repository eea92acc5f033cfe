"""`backup` and `restore`, as a person or a script calls them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import NOW, ROOT, called, make_home, read

from kedit_daemon.home import Home
from kedit_daemon.system.lock import hold_lock
from memory.db.store import Store


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "home")


def test_there_and_back(home: Home, tmp_path: Path) -> None:
    dest, other = tmp_path / "backup", Home(tmp_path / "other")
    with hold_lock(home.lock_file):  # as a running daemon does
        result = called(home, "backup", str(dest))
    assert (result.exit_code, result.stdout) == (0, f"{dest}\n")
    assert "facts 1 live-side, 1 live-weights, 1 received; generation 0, 7 events" in result.stderr
    back = called(other, "restore", str(dest))
    assert (back.exit_code, back.stdout) == (0, f"{other.root}\n")
    assert back.stderr.endswith(f"next: kedit-daemon --home {other.root} run\n")
    for words in (["facts", "--json"], ["log", "--json"], ["log", "verify", "--json"]):
        one, two = called(home, *words), called(other, *words)
        assert (one.exit_code, one.stdout) == (0, two.stdout)
    assert called(home, "log", "verify").stdout == called(Home(dest), "log", "verify").stdout


def test_json(home: Home, tmp_path: Path) -> None:
    told = read(called(home, "backup", str(tmp_path / "backup"), "--json"))
    assert told.keys() == {"path", "manifest"}
    assert json.loads((Path(told["path"]) / "manifest.json").read_bytes()) == told["manifest"]


def test_what_the_home_has_lost_is_told(home: Home, tmp_path: Path) -> None:
    store = Store(home.database_file, lambda: NOW)
    with store.db.transaction():
        store.artifacts.add_generation("ab" * 32, "", 0, "flush", (), {})
    store.close()
    result = called(home, "backup", str(tmp_path / "backup"))
    assert result.exit_code == 0
    name = f"state/generations/{'ab' * 32}.safetensors"
    assert f"note: {name} is missing or damaged in the home" in result.stderr


def test_a_dry_run_only_checks(home: Home, tmp_path: Path) -> None:
    dest, other = tmp_path / "backup", Home(tmp_path / "other")
    called(home, "backup", str(dest))
    result = called(other, "restore", str(dest), "--dry-run")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.endswith("dry run: the backup is whole; nothing is changed\n")
    assert not other.root.exists()
    (dest / "config.toml").write_text("other")
    result = called(other, "restore", str(dest), "--dry-run")
    assert (result.exit_code, "error[corrupt]" in result.stderr) == (1, True)


def test_what_is_refused(home: Home, tmp_path: Path) -> None:
    dest = tmp_path / "backup"
    assert called(home, "backup", str(home.root / "backup")).exit_code == 2
    assert called(home, "backup", str(dest)).exit_code == 0
    assert called(home, "backup", str(dest)).exit_code == 1
    assert called(home, "restore", str(dest)).exit_code == 1
    with hold_lock(home.lock_file):
        assert called(home, "restore", str(dest), "--replace").exit_code == 75
    result = called(home, "restore", str(dest), "--replace")
    assert result.exit_code == 0
    assert f"moved aside: {home.root}/state.before-" in result.stderr
    nothing = called(Home(tmp_path / "none"), "backup", str(tmp_path / "b"))
    assert (nothing.exit_code, "error[no-home]" in nothing.stderr) == (1, True)


def test_neither_needs_torch(home: Home, tmp_path: Path) -> None:
    calls = [["--home", str(home.root), "backup", str(tmp_path / "backup")]]
    calls += [["--home", str(tmp_path / "other"), "restore", str(tmp_path / "backup")]]
    for words in calls:
        code = (
            "import sys, atexit; from kedit_daemon.cli.main import main;"
            "atexit.register(lambda: print('torch' in sys.modules));"
            f"sys.argv[1:] = {words!r}; main()"
        )
        seen = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
        assert (seen.returncode, seen.stdout.splitlines()[-1]) == (0, b"False"), seen.stderr
