import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from command_line import called, make_home

from kedit_daemon.home import Home
from kedit_daemon.maintenance.backup import Backup, create_backup
from kedit_daemon.maintenance.restore import check_restore, refuse_unfinished_restore, restore
from kedit_daemon.system.lock import find_lock_holder, hold_lock
from kedit_daemon.system.orphans import RESTORE_PREFIX
from memory.db.store import Store
from memory.errors import KeditError

NOW = datetime(2026, 3, 1, tzinfo=UTC)
LATER = NOW + timedelta(minutes=1)
STAMP = "before-20260301T000000Z"


@pytest.fixture
def made(tmp_path: Path) -> Backup:
    home = make_home(tmp_path / "origin")
    home.config_file.write_text("# as it was\n")
    return create_backup(home, tmp_path / "backup", NOW)


@pytest.fixture
def used(tmp_path: Path) -> Home:
    """Another home, with a history of its own."""
    home = make_home(tmp_path / "used")
    home.config_file.write_text("# of today\n")
    (home.inbox_folder / "waits.jsonl").write_text("{}")
    store = Store(home.database_file, lambda: NOW)
    with store.db.transaction():
        store.db.write_event("daemon_stopped")
    store.close()
    return home


def files(folder: Path) -> dict[str, bytes]:
    """But for the lock, which holds nothing."""
    found = [p for p in folder.rglob("*") if p.is_file() and p.name != "daemon.lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def contents(backup: Backup) -> dict[str, bytes]:
    return {name: (backup.path / name).read_bytes() for name in backup.manifest["files"]}


def test_a_new_home_has_what_the_backup_has(made: Backup, tmp_path: Path) -> None:
    home = Home(tmp_path / "new/home")
    done = restore(home, made.path, False, NOW)
    assert (done.backup, done.moved_aside) == (made, ())
    assert files(home.root) == contents(made)
    for folder in (
        home.generations_folder,
        home.side_folder,
        home.index_folder,
        home.inbox_folder / "work",
    ):
        assert folder.is_dir()
    assert {p.name for p in home.root.iterdir()} == {"config.toml", "inbox", "state"}


def test_a_home_that_was_only_made_leaves_nothing_aside(made: Backup, tmp_path: Path) -> None:
    home = Home(tmp_path / "new")
    home.create_folders()
    assert restore(home, made.path, False, NOW).moved_aside == ()
    assert files(home.root) == contents(made)


def test_measurements_of_a_home_without_a_database_are_kept(made: Backup, tmp_path: Path) -> None:
    home = Home(tmp_path / "new")
    home.create_folders()
    (home.state_folder / "kedit.json").write_text("{}")
    home.config_file.write_text("# of today\n")
    aside = restore(home, made.path, False, NOW).moved_aside
    assert [p.name for p in aside] == [f"config.toml.{STAMP}", f"state.{STAMP}"]
    assert (aside[1] / "kedit.json").read_text() == "{}"


def test_a_home_with_a_database_is_refused(made: Backup, used: Home) -> None:
    before = files(used.root)
    with pytest.raises(KeditError, match="has a database already") as caught:
        restore(used, made.path, False, NOW)
    assert (caught.value.code, caught.value.exit_code) == ("exists", 1)
    assert files(used.root) == before


def test_what_is_replaced_is_moved_aside_whole(made: Backup, used: Home) -> None:
    before = files(used.root)
    done = restore(used, made.path, True, NOW)
    assert done.moved_aside == (used.root / f"config.toml.{STAMP}", used.root / f"state.{STAMP}")
    moved = {k: k.replace("config.toml", done.moved_aside[0].name) for k in before}
    moved = {k: v.replace("state/", f"{done.moved_aside[1].name}/") for k, v in moved.items()}
    moved["inbox/waits.jsonl"] = "inbox/waits.jsonl"
    assert files(used.root) == {moved[k]: v for k, v in before.items()} | contents(made)


def test_settings_that_are_the_same_stay(made: Backup, used: Home) -> None:
    used.config_file.write_text("# as it was\n")
    assert [p.name for p in restore(used, made.path, True, NOW).moved_aside] == [f"state.{STAMP}"]


@pytest.mark.parametrize("name", ["state/kedit.db", "config.toml"])
def test_a_backup_that_is_not_whole_changes_nothing(
    made: Backup, used: Home, tmp_path: Path, name: str
) -> None:
    path = made.path / name
    path.write_bytes(path.read_bytes() + b" ")
    before, new = files(used.root), Home(tmp_path / "new")
    for home in (used, new):
        with pytest.raises(KeditError, match="has changed"):
            restore(home, made.path, True, NOW)
    assert files(used.root) == before
    assert not new.root.exists()


def test_a_home_that_a_daemon_holds_is_refused(made: Backup, used: Home) -> None:
    before = files(used.root)
    with hold_lock(used.lock_file):
        for look in (restore, lambda *given: check_restore(*given[:3])):
            with pytest.raises(KeditError, match=f"pid {os.getpid()}") as caught:
                look(used, made.path, True, NOW)
            assert caught.value.exit_code == 75
    assert files(used.root) == before


def test_no_daemon_gets_in_between(
    made: Backup, used: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, held = os.rename, []

    def rename(source: Path, target: Path) -> None:
        real(source, target)
        held.append(find_lock_holder(used.lock_file))

    monkeypatch.setattr(os, "rename", rename)
    restore(used, made.path, True, NOW)
    assert held == [os.getpid(), None, os.getpid()]  # None: there is no state in between
    assert find_lock_holder(used.lock_file) is None


@pytest.fixture
def cut_off(made: Backup, used: Home) -> Home:
    """A home as a restore leaves it that is killed between its two last renames."""
    used.state_folder.rename(used.root / f"state.{STAMP}")
    shutil.copytree(made.path, used.root / f"{RESTORE_PREFIX}0")
    return used


def test_a_cut_off_restore_is_known_until_one_comes_to_its_end(
    made: Backup, cut_off: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy", full)
        with pytest.raises(KeditError, match="No space left"):
            restore(cut_off, made.path, False, LATER)
    assert not list(cut_off.root.glob(f"{RESTORE_PREFIX}*"))  # and there is an empty `state` now
    for command in ("init", "calibrate", "run"):
        result = called(cut_off, command)
        assert (result.exit_code, f"first move state.{STAMP} out" in result.stderr) == (78, True)
    assert not cut_off.database_file.exists()
    restore(cut_off, made.path, False, LATER)
    refuse_unfinished_restore(cut_off)
    assert files(cut_off.root / f"state.{STAMP}")


def test_who_does_not_want_what_was_moved_aside_can_begin_anew(
    cut_off: Home, tmp_path: Path
) -> None:
    with pytest.raises(KeditError) as caught:
        refuse_unfinished_restore(cut_off)
    names = (f"{RESTORE_PREFIX}0", f"state.{STAMP}")
    assert f"move {', '.join(names)} out of the home" in (caught.value.hint or "")
    for name in names:
        (cut_off.root / name).rename(tmp_path / name)
    refuse_unfinished_restore(cut_off)


@pytest.mark.parametrize("fails", ["copy", "rename"])
def test_a_restore_that_fails_leaves_what_was_there(
    made: Backup, used: Home, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    real = {"copy": shutil.copy, "rename": os.rename}[fails]

    def failing(source: Path, target: Path) -> object:
        if Path(source).name == {"copy": "kedit.db", "rename": "state"}[fails] and (
            RESTORE_PREFIX in str(source if fails == "rename" else target)
        ):
            raise OSError(28, "No space left on device")
        return real(source, target)

    before = files(used.state_folder)
    monkeypatch.setattr(*{"copy": (shutil, "copy"), "rename": (os, "rename")}[fails], failing)
    with pytest.raises(KeditError, match="No space left") as caught:
        restore(used, made.path, True, NOW)
    assert caught.value.code == "restore"
    assert files(used.state_folder) == before
    assert not list(used.root.glob(f"{RESTORE_PREFIX}*"))


def test_what_a_killed_restore_has_left_goes(made: Backup, tmp_path: Path) -> None:
    home = Home(tmp_path / "new")
    home.create_folders()
    (home.root / f"{RESTORE_PREFIX}0" / "state").mkdir(parents=True)
    restore(home, made.path, False, NOW)
    assert files(home.root) == contents(made)
    assert not list(home.root.glob(f"{RESTORE_PREFIX}*"))
