"""A damaged database is noticed and not used, and every command says what to do about it."""

import json
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from command_line import called, make_home, read
from damaged_home import Made, made, wrong
from editing_home import Bench
from promise_table import Tally

from kedit_daemon.home import Home
from memory.db.event_log import read_head
from memory.errors import KeditError

__all__ = ["made"]  # a fixture
pytestmark = pytest.mark.timeout(280)

DATABASE = "state/kedit.db"
PAGES, BITS = 12, 30


def page_size(path: Path) -> int:
    return int.from_bytes(path.read_bytes()[16:18], "big") % 65_535 or 65_536


def overwrite(path: Path, page: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(page * page_size(path))
        file.write(content)


def test_a_page_that_is_overwritten(made: Made, tmp_path: Path, tally: Tally, whole: bool) -> None:
    path, drawn = made.root / DATABASE, random.Random(0)
    size = page_size(path)
    pages = range(path.stat().st_size // size)
    chosen = pages if whole else sorted({0, 1, *drawn.sample(pages, PAGES)})
    bad, refused, tried = list[str](), list[str](), 0
    for page in chosen:
        for content in (drawn.randbytes(size), bytes(size)):

            def damage(root: Path, page: int = page, content: bytes = content) -> None:
                overwrite(root / DATABASE, page, content)

            found = wrong(made, tmp_path / "home", damage, refused)
            bad += [f"page {page}: {found}"] if found else []
            tried += 1
    tally.tried(tried, bad=len(bad))
    assert bad == []
    assert len(refused) > tried // 2  # the rest is made again, or was in no use


def test_a_flipped_bit(made: Made, tmp_path: Path, tally: Tally, whole: bool) -> None:
    path, drawn = made.root / DATABASE, random.Random(1)
    count, bad, refused = (200 if whole else BITS), list[str](), list[str]()
    for _ in range(count):
        at, bit = drawn.randrange(path.stat().st_size), drawn.randrange(8)

        def damage(root: Path, at: int = at, bit: int = bit) -> None:
            data = bytearray((root / DATABASE).read_bytes())
            data[at] ^= 1 << bit
            (root / DATABASE).write_bytes(data)

        found = wrong(made, tmp_path / "home", damage, refused)
        bad += [f"byte {at}: {found}"] if found else []
    tally.tried(count, bad=len(bad))
    assert bad == []


CUTS: dict[str, Callable[[bytes], bytes]] = {
    "half": lambda data: data[: len(data) // 2],
    "a page less": lambda data: data[:-4096],
    "a byte less": lambda data: data[:-1],
    "no database": lambda data: b"all of this is text" * 500,
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_database_that_is_cut_off(cut: str, made: Made, tmp_path: Path) -> None:
    def damage(root: Path) -> None:
        path = root / DATABASE
        path.write_bytes(CUTS[cut](path.read_bytes()))

    refused = list[str]()
    assert wrong(made, tmp_path / "home", damage, refused) == ""
    if not refused:  # what is cut off is of the log, which is read when it is verified
        shutil.copytree(made.root, tmp_path / "cut")
        damage(tmp_path / "cut")
        found = called(Home(tmp_path / "cut"), "log", "verify")
        assert found.exit_code == 1 and found.output.startswith("broken"), found.output


CHANGES = {
    "a fact": "UPDATE facts SET record = replace(record, 'Rome', 'Lima')",
    "a state": "UPDATE facts SET state = 'live'",
    "a record": "UPDATE facts SET record = substr(record, 1, 50)",
    "a generation": "UPDATE generations SET fact_ids = '[' WHERE id > 0",
    "the active generation": "UPDATE meta SET value = '1' WHERE key = 'active_generation'",
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_the_rows_say_cannot_be(change: str, made: Made, tmp_path: Path) -> None:
    def damage(root: Path) -> None:
        with closing(sqlite3.connect(root / DATABASE)) as conn, conn:
            assert conn.execute(CHANGES[change]).rowcount

    refused = list[str]()
    assert wrong(made, tmp_path / "home", damage, refused) == ""
    assert len(refused) == 1


@pytest.mark.parametrize("name", ["events_fact_id", "job_run", "facts_slot"])
def test_a_page_that_is_not_looked_at_before_it_is_needed(
    name: str, made: Made, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(made.root / DATABASE)) as conn:
        asked = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        ((page,),) = conn.execute(asked, (name,))

    def damage(root: Path) -> None:
        overwrite(root / DATABASE, page - 1, random.Random(name).randbytes(4096))

    refused = list[str]()
    assert wrong(made, tmp_path / "home", damage, refused) == ""
    assert len(refused) == 1


@pytest.mark.parametrize("table", ["terms", "side_keys"])
def test_tensors_in_the_database(table: str, made: Made, tmp_path: Path) -> None:
    def damage(root: Path) -> None:
        with closing(sqlite3.connect(root / DATABASE)) as conn, conn:
            conn.execute(f"UPDATE {table} SET tensors = zeroblob(length(tensors))")

    refused = list[str]()
    assert wrong(made, tmp_path / "home", damage, refused) == ""
    assert refused == []


def test_what_a_lost_generation_is_made_from_is_lost_too(made: Made, tmp_path: Path) -> None:
    def damage(root: Path) -> None:
        (root / made.file("generations").relative_to(made.root)).unlink()
        with closing(sqlite3.connect(root / DATABASE)) as conn, conn:
            conn.execute("UPDATE terms SET tensors = zeroblob(length(tensors))")

    refused = list[str]()
    assert wrong(made, tmp_path / "home", damage, refused) == ""
    assert len(refused) == 1 and "is missing" in refused[0]


def test_an_audit_notices_what_a_start_does_not(bench: Callable[..., Bench]) -> None:
    at = bench()
    broken = at.home.root / "broken.db"
    with at.store.db.transaction():
        for n in range(50):
            at.store.db.set_meta(f"key {n}", "x")
    at.store.db.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copy(at.home.database_file, broken)
    with closing(sqlite3.connect(broken)) as conn:
        (page,) = conn.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'sqlite_autoindex_meta_1'"
        ).fetchone()
    data = bytearray(at.home.database_file.read_bytes())
    first = (page - 1) * page_size(broken)
    found = data.index(b"key 33", first)
    data[found : found + 6] = b"key 3X"
    at.home.database_file.write_bytes(data)
    with pytest.raises(KeditError, match="damaged") as caught:
        at.editor.audit()
    assert caught.value.exit_code == 78 and "restore" in caught.value.hint


# What commands say ----------------------------------------------------------------------------

COMMANDS = [
    ["status"],
    ["facts"],
    ["show", "mine"],
    ["log"],
    ["log", "verify"],
    ["backup", "{}/backup"],
    ["export", "facts", "{}/exports"],
    ["doctor"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_on_a_damaged_database(words: list[str], tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    for page in range(1, home.database_file.stat().st_size // 4096):
        overwrite(home.database_file, page, random.Random(page).randbytes(4096))
    done = called(home, *(word.format(tmp_path) for word in words))
    assert done.exit_code in (1, 78), done.output
    assert "Traceback" not in done.output and "unexpected" not in done.output
    assert str(home.database_file) in done.output and (
        "hint:" in done.output or words == ["doctor"]
    )
    assert not (tmp_path / "backup").exists()
    assert not list((tmp_path / "exports").glob("[!.]*"))


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"seq": "x"}', b"\xff\xfe", b"\0" * 80])
def test_a_garbled_head(text: bytes, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    home.head_file.write_bytes(text)
    with pytest.raises(KeditError, match=r"audit\.head"):
        read_head(home.head_file)
    for words in (["log", "verify"], ["doctor"]):
        done = called(home, *words)
        assert done.exit_code == 1 and str(home.head_file) in done.output
    checks = {c["name"]: c for c in read(called(home, "doctor", "--json"))["checks"]}
    assert checks["chain"]["outcome"] == "failed" and checks["chain"]["remedy"]
    assert called(home, "status").exit_code == 3


def test_a_lost_head_is_no_damage(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    home.head_file.unlink()
    assert called(home, "log", "verify").exit_code == 0


GARBLED = [b"\xff\xfe", b"model = ", b"model = 5", b"\0" * 200, b"[inbox]\nmax_byte = 5", b"model"]


@pytest.mark.parametrize("text", GARBLED)
def test_garbled_settings(text: bytes, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    home.config_file.write_bytes(text)
    done = called(home, "run")
    assert done.exit_code == 78 and str(home.config_file) in done.output and "hint:" in done.output
    assert "Traceback" not in done.output


def test_a_garbled_site(tmp_path: Path, made: Made) -> None:
    home = Home(tmp_path / "home")
    shutil.copytree(made.root, home.root)
    config = {"model": made.loaded.name, "device": "cpu"}
    home.config_file.write_text("".join(f"{k} = {json.dumps(v)}\n" for k, v in config.items()))
    for text in (b"", b"{", b"\xff", b'{"site": {}}'):
        (home.state_folder / "kedit.json").write_bytes(text)
        done = called(home, "run")
        assert done.exit_code == 78 and "kedit.json" in done.output and "hint:" in done.output
