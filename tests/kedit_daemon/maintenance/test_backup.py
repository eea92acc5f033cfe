import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from home_tools import LIMA, OSLO, ROME, Published
from sqlite_utils import Database

from kedit_daemon.maintenance.backup import MANIFEST, Backup, check_backup, create_backup
from memory.db import event_log
from memory.db.queries import open_readonly
from memory.errors import KeditError
from memory.facts import Fact
from memory.files import hash_file
from memory.model.editable import EditableModel
from policies.edit_site import SITE_FILE

PICTURE = "0123456789abcdef" * 2
NOW = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture
def at(tmp_path: Path, model: EditableModel) -> Iterator[Published]:
    """A home with two generations, two facts beside the weights, and a kept head."""
    at = Published(tmp_path / "home", model)
    at.home.config_file.write_text("# mine\n")
    at.learn(ROME, 1, seed=1)
    at.learn(OSLO, 2, seed=2)
    at.generation(1)
    at.generation(2)
    newest = event_log.read_newest_event(at.store.db.conn)
    assert newest is not None
    event_log.write_head(at.home.head_file, newest)
    (at.home.state_folder / SITE_FILE).write_text("{}")
    (at.home.state_folder / "statistics-0123456789abcdef.safetensors").write_bytes(b"figures")
    (at.home.index_folder / f"{'0' * 64}.safetensors").write_bytes(b"index")
    (at.home.inbox_folder / "waits.jsonl").write_text("{}")
    (at.home.pictures_folder / PICTURE).write_bytes(b"picture")
    (at.home.pictures_folder / ".0123456789abcdef.tmp").write_bytes(b"half a picture")
    yield at
    at.store.close()


@pytest.fixture
def made(at: Published, tmp_path: Path) -> Backup:
    return create_backup(at.home, tmp_path / "to" / "backup", NOW)


def files(folder: Path) -> dict[str, bytes]:
    """But for those that SQLite makes beside a database that is read."""
    found = [p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(("-shm", "-wal"))]
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def change_manifest(backup: Backup, change: Callable[[dict[str, Any]], object]) -> None:
    path = backup.path / MANIFEST
    manifest = json.loads(path.read_bytes())
    change(manifest)
    path.write_text(json.dumps(manifest))


def change_database(backup: Backup, *statements: str) -> None:
    """And say in the manifest that it is so."""
    path = backup.path / "state/kedit.db"
    with closing(Database(path, execute_plugins=False).conn) as conn:
        for statement in statements:
            conn.execute(statement)
        conn.commit()
    change_manifest(backup, lambda m: m["files"].update({"state/kedit.db": hash_file(path)}))


def test_it_holds_what_the_database_names_and_no_more(at: Published, tmp_path: Path) -> None:
    before = files(at.home.root)
    at.forget(ROME, 1)  # its file is there still
    made = create_backup(at.home, tmp_path / "backup", NOW)
    tensors = [at.file_of(1), at.file_of(2)]
    tensors += [
        at.home.side_folder / f"{row.sha256}.safetensors"
        for row in at.store.artifacts.list_shards()
    ]
    names = {str(p.relative_to(at.home.root)) for p in tensors}
    names |= {"config.toml", "state/kedit.db", "state/audit.head", f"state/{SITE_FILE}"}
    names |= {"state/statistics-0123456789abcdef.safetensors", f"state/pictures/{PICTURE}"}
    assert files(made.path).keys() == names | {MANIFEST}
    told = made.manifest
    assert json.loads((made.path / MANIFEST).read_bytes()) == told
    assert told["files"] == {name: hash_file(made.path / name) for name in names}
    newest, weights = (
        event_log.read_newest_event(at.store.db.conn),
        at.store.artifacts.get_generation(2).weights_hash,
    )
    assert newest is not None
    assert told["chain"] == {"seq": newest.seq, "hash": newest.hash}
    assert (told["generation"], told["weights_sha256"]) == (2, weights)
    assert told["facts"] == {"live-side": 1, "reverted": 1}
    assert (told["generations"], told["shards"], told["lost"]) == (3, 1, [])
    assert told["created_at"] == "2026-03-01T00:00:00Z"
    for name in names - {"state/kedit.db"}:
        assert (made.path / name).read_bytes() == before[name]
    assert [p.name for p in made.path.parent.iterdir() if p.name.startswith(".")] == []


def test_it_is_read_where_nothing_can_be_written_beside_it(made: Backup) -> None:
    before = set(made.path.rglob("*"))
    assert check_backup(made.path) == made
    assert set(made.path.rglob("*")) == before
    with closing(open_readonly(made.path / "state/kedit.db")) as conn:
        assert conn.execute("PRAGMA journal_mode").fetchone()[0] == "delete"


def test_files_that_the_daemon_drops_meanwhile_are_not_missed(
    at: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, shards = shutil.copy, {row.sha256: row.id for row in at.store.artifacts.list_shards()}
    before, after = at.learn(LIMA, 3, seed=3), {1: ROME, 2: OSLO}

    def drop(path: Path, fact: Fact, shard: int) -> None:
        at.forget(fact, shard)  # as the daemon does: the row, then the file
        path.unlink()

    def meanwhile(source: Path, target: Path) -> object:
        if before.exists():
            drop(before, LIMA, 3)
        done, shard = real(source, target), shards.get(source.stem)
        if len(after) == 2 and shard in after:
            drop(source, after.pop(shard), shard)
        return done

    monkeypatch.setattr(shutil, "copy", meanwhile)
    made = create_backup(at.home, tmp_path / "backup", NOW)
    assert made.manifest["lost"] == []
    assert made.manifest["facts"] == {"live-side": 1, "reverted": 2}
    side = [p.stem for p in (made.path / "state/side").iterdir()]
    assert side == [row.sha256 for row in at.store.artifacts.list_shards()]
    assert check_backup(made.path) == made


def test_a_daemon_that_always_drops_one_ends_it(
    at: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seed = shutil.copy, 10
    there = at.learn(LIMA, 3, seed=seed)

    def meanwhile(source: Path, target: Path) -> object:
        nonlocal there, seed
        if source == there:
            seed += 1
            at.forget(LIMA, 3)
            there.unlink()
            there = at.learn(LIMA, 3, seed=seed)
        return real(source, target)

    monkeypatch.setattr(shutil, "copy", meanwhile)
    with pytest.raises(KeditError, match="has dropped files") as caught:
        create_backup(at.home, tmp_path / "backup", NOW)
    assert (caught.value.code, caught.value.exit_code) == ("busy", 75)
    assert {p.name for p in tmp_path.iterdir()} == {"home"}


@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_a_file_that_the_home_has_lost_is_told(at: Published, tmp_path: Path, damage: str) -> None:
    path = at.file_of(1)
    path.write_bytes(b"no tensors") if damage == "changed" else path.unlink()
    made = create_backup(at.home, tmp_path / "backup", NOW)
    name = str(path.relative_to(at.home.root))
    assert made.manifest["lost"] == [name]
    assert name not in made.manifest["files"]
    assert not (made.path / name).exists()
    assert check_backup(made.path) == made


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_there_stays(at: Published, tmp_path: Path, kind: str) -> None:
    dest = tmp_path / "backup"
    {"folder": dest.mkdir, "file": dest.touch, "link": lambda: dest.symlink_to("nowhere")}[kind]()
    with pytest.raises(KeditError, match="exists already") as caught:
        create_backup(at.home, dest, NOW)
    assert (caught.value.code, caught.value.exit_code) == ("exists", 1)
    assert dest.is_symlink() or not dest.is_dir() or not list(dest.iterdir())


def test_a_home_holds_no_backup_of_itself(at: Published, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(at.home.root)
    for dest in (at.home.root / "backup", at.home.state_folder / "a/b", tmp_path / "link/backup"):
        with pytest.raises(KeditError, match="lies in the home") as caught:
            create_backup(at.home, dest, NOW)
        assert caught.value.exit_code == 2
        assert not dest.exists()


def test_a_home_that_could_not_be_restored_gives_no_backup(at: Published, tmp_path: Path) -> None:
    with at.store.db.transaction():
        at.store.db.conn.execute("DROP TRIGGER events_no_update")
        at.store.db.conn.execute("UPDATE events SET at = '2020' WHERE seq = 2")
    with pytest.raises(KeditError, match="event 2 has been changed"):
        create_backup(at.home, tmp_path / "backup", NOW)
    assert {p.name for p in tmp_path.iterdir()} == {"home"}


def test_where_nothing_can_be_written(at: Published, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(KeditError, match="cannot back up to") as caught:
        create_backup(at.home, tmp_path / "file/backup", NOW)
    assert caught.value.code == "backup"


def test_any_change_is_found(made: Backup) -> None:
    for name in made.manifest["files"]:
        path = made.path / name
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(KeditError, match="has changed") as caught:
            check_backup(made.path)
        assert (caught.value.code, name in str(caught.value)) == ("corrupt", True)
        path.unlink()
        with pytest.raises(KeditError, match="is missing"):
            check_backup(made.path)
        path.symlink_to(made.path / MANIFEST)
        with pytest.raises(KeditError, match="is missing"):
            check_backup(made.path)
        path.unlink()
        path.write_bytes(data)
    assert check_backup(made.path) == made


def without_a_generation(manifest: dict[str, Any]) -> None:
    name = next(n for n in manifest["files"] if "generations" in n)
    del manifest["files"][name]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m["facts"].update({"live-side": 3}), "differs from manifest.json: facts"),
        (lambda m: m["chain"].update(seq=1), "differs from manifest.json: chain"),
        (lambda m: m.update(generation=1), "differs from manifest.json: generation"),
        (lambda m: m.update(lost=[next(iter(m["files"]))]), "lists other tensor files"),
        (without_a_generation, "lists other tensor files"),
        (lambda m: m.update(format="kedit-backup-2"), "not of the form"),
        (lambda m: m.update(files=[]), "not of the form"),
        (lambda m: m["files"].pop("state/kedit.db"), "names other files"),
        (lambda m: m["files"].update({"../evil": "0"}), "names other files"),
        (lambda m: m["files"].update({"state/daemon.lock": "0"}), "names other files"),
        (lambda m: m["files"].update({"/etc/passwd": "0"}), "names other files"),
    ],
)
def test_a_manifest_that_is_not_true_is_found(
    made: Backup, change: Callable[[dict[str, Any]], object], problem: str
) -> None:
    change_manifest(made, change)
    with pytest.raises(KeditError, match=problem) as caught:
        check_backup(made.path)
    assert caught.value.code == "corrupt"


@pytest.mark.parametrize("text", ["", "[]", "{", "{}"])
def test_a_manifest_that_is_none(made: Backup, text: str) -> None:
    (made.path / MANIFEST).write_text(text)
    with pytest.raises(KeditError) as caught:
        check_backup(made.path)
    assert caught.value.code == "corrupt"


def test_a_folder_that_is_no_backup(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(KeditError, match="is no backup"):
            check_backup(folder)


def test_a_database_that_was_changed_with_its_manifest_is_found_by_its_chain(made: Backup) -> None:
    drop = "DROP TRIGGER events_no_delete"
    last = "DELETE FROM events WHERE seq = (SELECT max(seq) FROM events)"
    change_database(made, drop, last)
    with pytest.raises(KeditError, match="the kept head is event"):
        check_backup(made.path)


def test_a_backup_of_a_newer_version_is_refused(made: Backup) -> None:
    change_database(
        made, "INSERT INTO _sqlite_migrations VALUES (2, 'kedit', 'm999_later', '2030-01-01')"
    )
    with pytest.raises(KeditError, match="newer version: it has m999_later") as caught:
        check_backup(made.path)
    assert caught.value.exit_code == 78


def test_nothing_beside_a_backup_is_touched(at: Published, tmp_path: Path) -> None:
    to = tmp_path / "to"
    names = (".monday.partial-0a0a0a0a/state", ".mail.partial-0c0c0c0c")  # whose are they?
    for name in names:
        (to / name).mkdir(parents=True)
    create_backup(at.home, to / "tuesday", NOW)
    assert all((to / name).is_dir() for name in names)
    assert len(list(to.iterdir())) == len(names) + 1
