"""Which folder is the home, and what is made in it."""

import stat
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from kedit_daemon.home import Home
from memory.errors import KeditError

EVERYTHING = {
    "KEDIT_HOME": "/from/variable",
    "STATE_DIRECTORY": "/from/systemd:/other",
    "XDG_STATE_HOME": "/from/xdg",
    "HOME": "/home/someone",
}


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in EVERYTHING.items() if name not in names}


def test_each_source_yields_to_the_one_before() -> None:
    assert Home.from_environ(Path("/asked/for"), EVERYTHING).root == Path("/asked/for")
    assert Home.from_environ(None, EVERYTHING).root == Path("/from/variable")
    assert Home.from_environ(None, without("KEDIT_HOME")).root == Path("/from/systemd")
    shell = without("KEDIT_HOME", "STATE_DIRECTORY")
    assert Home.from_environ(None, shell).root == Path("/from/xdg/kedit-daemon")
    bare = {"HOME": "/home/someone"}
    assert Home.from_environ(None, bare).root == Path("/home/someone/.local/state/kedit-daemon")


def test_the_cache_is_the_users_and_shared_by_homes() -> None:
    def cache(**environ: str) -> Path | None:
        return Home.from_environ(Path("/home"), environ).shared_cache

    assert cache(HOME="/h") == Path("/h/.cache/kedit-daemon")
    assert cache(HOME="/h", XDG_CACHE_HOME="here") == Path("/h/.cache/kedit-daemon")
    assert cache(HOME="/h", XDG_CACHE_HOME="/x") == Path("/x/kedit-daemon")
    assert cache(HOME="/h", XDG_CACHE_HOME="/x", KEDIT_CACHE="/mine") == Path("/mine")
    shared = Home.from_environ(Path("/home"), {"KEDIT_CACHE": "/mine"})
    assert shared.models_folder == Path("/mine/models")
    assert Home(Path("/home")).models_folder == Path("/home/state/models")


def test_a_user_without_a_folder_has_a_home_that_shares_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as for an unknown user
    home = Home.from_environ(Path("/home"), {})
    assert (home.root, home.shared_cache) == (Path("/home"), None)


def test_empty_variables_and_a_relative_xdg_folder_do_not_count() -> None:
    environ = {"KEDIT_HOME": "", "STATE_DIRECTORY": "", "XDG_STATE_HOME": "here", "HOME": "/h"}
    assert Home.from_environ(None, environ).root == Path("/h/.local/state/kedit-daemon")


def test_a_relative_option_is_taken_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Home.from_environ(Path("mine"), {}).root == tmp_path / "mine"


def test_create_makes_every_folder_and_may_be_repeated(tmp_path: Path) -> None:
    home = Home(tmp_path / "deep" / "home")
    home.create_folders()
    home.inbox_folder.chmod(0o2770)
    home.create_folders()
    made = {str(p.relative_to(home.root)) for p in home.root.rglob("*")}
    assert made == {
        "inbox",
        "inbox/work",
        "inbox/done",
        "inbox/failed",
        "state",
        "state/generations",
        "state/side",
        "state/index",
        "state/pictures",
    }
    assert stat.S_IMODE(home.inbox_folder.stat().st_mode) == 0o2770
    assert not stat.S_IMODE(home.state_folder.stat().st_mode) & stat.S_IRWXO


def test_files_lie_where_the_contract_says() -> None:
    home = Home(Path("/h"))
    assert [
        str(p)
        for p in (
            home.config_file,
            home.database_file,
            home.lock_file,
            home.socket_file,
            home.head_file,
        )
    ] == [
        "/h/config.toml",
        "/h/state/kedit.db",
        "/h/state/daemon.lock",
        "/h/state/control.sock",
        "/h/state/audit.head",
    ]


def test_a_home_that_cannot_be_made_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(KeditError, match="cannot make a home") as caught:
        Home(tmp_path / "file").create_folders()
    assert "--home" in caught.value.hint


@pytest.mark.parametrize("module", ["home", "system.lock", "control", "system.sd_notify"])
def test_quick_commands_load_the_standard_library_alone(module: str) -> None:
    program = f"""
import sys
before = set(sys.modules)
import kedit_daemon.{module}
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
print(*sorted(new - sys.stdlib_module_names - {{"kedit_daemon", "memory"}}))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == ""
