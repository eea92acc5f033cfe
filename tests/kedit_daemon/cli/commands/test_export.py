"""`export`, from a home to a folder, as a person or a script calls it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import EYRE, NOW, OSLO, called, make_home, read

from kedit_daemon.home import Home
from kedit_daemon.system.lock import hold_lock
from memory.db.store import Store
from memory.facts import FactState


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    made = make_home(tmp_path / "home")
    store = Store(made.database_file, lambda: NOW)
    with store.db.transaction():
        store.db.set_meta("model", "/srv/models/my model\x1b")
        store.db.set_meta("base_hash", "ab" * 32)
    store.close()
    yield made


def contents(home: Home) -> dict[str, bytes]:
    """The home's files, but for those that SQLite makes beside a database that is read."""
    files = [p for p in home.root.rglob("*") if p.is_file()]
    return {str(p): p.read_bytes() for p in files if not p.name.endswith(("-shm", "-wal"))}


def test_it_prints_the_folder_and_says_the_same_twice(home: Home, tmp_path: Path) -> None:
    before = contents(home)
    one = called(home, "export", "facts", str(tmp_path / "a"))
    assert (one.exit_code, one.stderr) == (0, "")
    path = Path(one.stdout.strip())
    assert path.parent == tmp_path / "a"
    assert path.name.startswith("my-model-gen-0-facts-")
    again = called(home, "export", "facts", str(tmp_path / "a"))
    assert (again.exit_code, again.stdout) == (0, one.stdout)
    assert "exists already" in again.stderr
    other = Path(called(home, "export", "facts", str(tmp_path / "b")).stdout.strip())
    files = {p.name: p.read_bytes() for p in path.iterdir()}
    assert files == {p.name: p.read_bytes() for p in other.iterdir()}
    assert files.keys() == {"facts.jsonl", "manifest.json"}
    assert contents(home) == before


def test_the_manifest_says_what_is_in_it(home: Home, tmp_path: Path) -> None:
    told = read(called(home, "export", "facts", str(tmp_path / "a"), "--json"))
    assert told.keys() == {"path", "existed", "removed", "notes", "manifest"}
    manifest = json.loads((Path(told["path"]) / "manifest.json").read_bytes())
    assert manifest == told["manifest"]
    assert [f["id"] for f in manifest["facts"]] == [EYRE.id, OSLO.id]
    assert manifest["facts"][1] == {
        "id": OSLO.id,
        "subject": "Oslo",
        "prompt": "{} lies in",
        "target": "Norway",
    }
    assert (manifest["kind"], manifest["generation"]) == ("facts", 0)
    assert (manifest["base_sha256"], manifest["not_in_it"]) == ("ab" * 32, {"count": 0, "ids": []})


def test_keep_and_what_was_deleted(home: Home, tmp_path: Path) -> None:
    first = Path(called(home, "export", "facts", str(tmp_path / "a")).stdout.strip())
    store = Store(home.database_file, lambda: NOW)
    with store.db.transaction():
        store.change_state(EYRE.id, FactState.REVERTED)
    store.close()
    done = called(home, "export", "facts", str(tmp_path / "a"), "--keep", "1")
    assert f"deleted: {first.name}" in done.stderr
    assert [str(p) for p in (tmp_path / "a").iterdir()] == [done.stdout.strip()]


def test_it_works_while_the_daemon_holds_the_home(home: Home, tmp_path: Path) -> None:
    with hold_lock(home.lock_file):
        assert called(home, "export", "facts", str(tmp_path / "a")).exit_code == 0


def test_a_folder_in_the_home_is_refused(home: Home) -> None:
    for dest in (home.root, home.inbox_folder, home.root / "new"):
        done = called(home, "export", "facts", str(dest))
        assert (done.exit_code, done.stdout) == (2, "")
    assert not (home.root / "new").exists()


def test_a_home_without_a_model_yet(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    done = called(home, "export", "facts", str(tmp_path / "a"))
    assert done.exit_code == 1
    assert "no daemon has run" in done.stderr


@pytest.mark.parametrize("words", [["all", "x"], ["facts"], ["facts", "x", "--keep", "0"]])
def test_wrong_usage(home: Home, words: list[str]) -> None:
    assert called(home, "export", *words).exit_code == 2
