import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from kedit_daemon.cli.main import cli
from kedit_daemon.config import render_default_config
from kedit_daemon.control import ControlServer
from kedit_daemon.home import Home
from kedit_daemon.maintenance.doctor import clean_home, run_checks
from kedit_daemon.maintenance.doctor_install import CheckResult
from kedit_daemon.system import lock
from memory.db.event_log import write_head
from memory.db.store import Store
from memory.files import write_atomic

NOW = datetime.now(UTC)


@pytest.fixture
def home(tmp_path: Path, model_folder: Callable[[str], Path]) -> Home:
    home = Home(tmp_path / "home")
    home.create_folders()
    home.config_file.write_text(render_default_config(str(model_folder("llama"))))
    return home


def used(home: Home, sha256: str | None = None) -> None:
    store = Store(home.database_file, lambda: NOW)
    with store.db.transaction():
        event = store.db.write_event("started")
        if sha256 is not None:
            store.artifacts.activate_generation(
                store.artifacts.add_generation(sha256, "h", 0, "flush", [], {})
            )
    store.close()
    write_head(home.head_file, event)


def checks(home: Home, now: datetime = NOW) -> dict[str, CheckResult]:
    return {check.name: check for check in run_checks(home, {}, now)}


def outcome(home: Home, name: str) -> tuple[str, str]:
    check = checks(home)[name]
    assert bool(check.remedy) == (check.outcome != "ok"), check
    return check.outcome, check.detail


def test_a_fresh_home_has_nothing_failed(home: Home) -> None:
    found = checks(home)
    assert [c for c in found.values() if c.outcome == "failed"] == []
    assert {"python", "packages", "faiss", "sqlite", "torch", "model", "database"} <= set(found)
    assert found["daemon"].outcome == "warning"


def test_a_used_home_has_nothing_failed(home: Home) -> None:
    used(home)
    found = checks(home)
    assert [c for c in found.values() if c.outcome == "failed"] == []
    assert found["chain"].detail == "1 events"
    assert found["weights"].detail == "unedited"


def test_no_home(tmp_path: Path) -> None:
    found = checks(Home(tmp_path / "none"))
    assert (found["home"].outcome, found["home"].remedy) == ("failed", "kedit-daemon init")
    assert found["config"].outcome == "failed"
    assert "init" in found["config"].remedy


def test_settings_that_are_wrong(home: Home) -> None:
    home.config_file.write_text("[inbox]\nmax_byte = 1\n")
    check = checks(home)["config"]
    assert (check.outcome, check.remedy) == ("failed", "did you mean max_bytes?")


def test_a_device_that_is_not_there(home: Home) -> None:
    home.config_file.write_text(home.config_file.read_text().replace('"auto"', '"cuda:99"'))
    assert outcome(home, "torch")[0] == "failed"


def test_a_model_that_is_not_there(home: Home, tmp_path: Path) -> None:
    home.config_file.write_text(render_default_config(str(tmp_path / "model")))
    assert outcome(home, "model") == ("failed", f"there is no {tmp_path / 'model'}")
    home.config_file.write_text(render_default_config("meta-llama/Llama-3.2-1B"))
    assert outcome(home, "model")[0] == "ok"


def test_a_folder_that_is_open_to_all(home: Home) -> None:
    home.state_folder.chmod(0o777)
    assert outcome(home, "home") == ("warning", f"everybody may write to {home.state_folder}")


def test_a_running_daemon(home: Home) -> None:
    with lock.hold_lock(home.lock_file):
        assert outcome(home, "daemon")[0] == "warning"
        server = ControlServer(home.socket_file)
        server.start()
        assert outcome(home, "daemon")[0] == "ok"
        server.stop()


def test_a_damaged_database(home: Home) -> None:
    used(home)
    data = bytearray(home.database_file.read_bytes())
    data[4096 : 3 * 4096] = b"\xff" * 2 * 4096
    home.database_file.write_bytes(data)
    found = checks(home)
    assert found["database"].outcome == "failed"
    assert "backup" in found["database"].remedy


def test_history_that_was_changed(home: Home) -> None:
    used(home)
    write_atomic(home.head_file, b'{"seq": 1, "hash": "00"}')
    assert outcome(home, "chain")[0] == "failed"
    write_atomic(home.head_file, b"nothing")
    assert outcome(home, "chain")[0] == "failed"


def test_a_clock_that_was_set_back(home: Home) -> None:
    used(home)
    assert checks(home, NOW - timedelta(hours=1))["clock"].outcome == "warning"


def test_weights_that_are_gone_or_damaged(home: Home) -> None:
    sha = "ab" * 32
    used(home, sha)
    path = home.generations_folder / f"{sha}.safetensors"
    assert outcome(home, "weights") == ("warning", f"{path} is missing")
    path.write_bytes(b"other bytes")
    assert outcome(home, "weights") == ("warning", f"{path} is damaged")


def test_files_in_failed(home: Home) -> None:
    (home.inbox_folder / "failed" / "a.jsonl.error.json").write_text("{}")
    assert outcome(home, "inbox")[0] == "warning"


def test_the_command_fails_when_a_check_does(home: Home) -> None:
    run = CliRunner()
    result = run.invoke(cli, ["--home", str(home.root), "doctor", "--json"])
    assert (result.exit_code, json.loads(result.stdout)["ok"]) == (0, True)
    home.config_file.unlink()
    result = run.invoke(cli, ["--home", str(home.root), "doctor"])
    assert result.exit_code == 1
    assert "✗ config" in result.stdout
    assert "→ make one with" in result.stdout


def crashed(home: Home) -> set[Path]:
    """Files of which nobody knows: unfinished ones, tensors that no row names, half a restore."""
    used(home, "ab" * 32)
    (home.generations_folder / f"{'ab' * 32}.safetensors").write_bytes(b"named")
    (home.inbox_folder / "failed" / "a.jsonl").write_text("a person's")
    left = [
        f / f".{'0' * 16}.tmp" for f in (home.root, home.state_folder, home.inbox_folder / "failed")
    ]
    left += [home.generations_folder / f"{'0' * 64}.safetensors", home.index_folder / ".tmpXyZ09a"]
    for path in left:
        path.write_bytes(b"left")
    (home.root / ".kedit-restore-1" / "state").mkdir(parents=True)
    return {*left, home.root / ".kedit-restore-1"}


def test_what_a_crash_has_left_is_told_and_taken_away(home: Home) -> None:
    left = crashed(home)
    assert outcome(home, "leftovers")[0] == "warning"
    before = {p for p in home.root.rglob("*") if p.parent.name != ".kedit-restore-1"}
    result = CliRunner().invoke(cli, ["--home", str(home.root), "doctor", "--fix", "--json"])
    assert {Path(p) for p in json.loads(result.stdout)["removed"]} == left
    beside = {home.database_file.with_name(f"kedit.db{n}") for n in ("-shm", "-wal")}
    assert {*home.root.rglob("*")} - beside == before - left - beside | {home.lock_file}
    assert outcome(home, "leftovers") == ("ok", "none")
    assert clean_home(home) == []


def test_a_daemons_unfinished_files_are_its_own(home: Home) -> None:
    left = crashed(home)
    with lock.hold_lock(home.lock_file):
        assert "leftovers" not in checks(home)
        result = CliRunner().invoke(cli, ["--home", str(home.root), "doctor", "--fix"])
    assert result.exit_code == 75
    assert all(path.exists() for path in left)


def test_what_is_not_named_as_ours_stays(home: Home) -> None:
    tensors = (home.generations_folder, home.side_folder, home.index_folder)
    kept = {folder / ".snapshot" / "daily" for folder in tensors}
    kept |= {folder / f"{'1' * 64}.safetensors" / "file" for folder in tensors}
    kept |= {home.state_folder / f".{'0' * 16}.tmp" / "file", home.side_folder / "notes.txt"}
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    link = home.side_folder / f"{'2' * 64}.safetensors"
    link.symlink_to(home.side_folder / "notes.txt")
    assert clean_home(home) == []
    assert all(path.exists() for path in {*kept, link})


def test_without_a_database_tensors_are_not_judged(home: Home) -> None:
    kept, left = (
        home.generations_folder / f"{'0' * 64}.safetensors",
        home.state_folder / f".{'0' * 16}.tmp",
    )
    kept.write_bytes(b"whose?")
    left.write_bytes(b"left")
    assert clean_home(home) == [left]
    assert kept.exists()
    assert clean_home(Home(home.root / "none")) == []
