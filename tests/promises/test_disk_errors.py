"""An I/O error is never ignored: what meets one ends, says so, and leaves nothing half done."""

import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from command_line import NOW, called, make_home
from disk_lives import Maker, calm, intact, lived, maker, measured
from faulty_disk import fill, root, small_disk, traced
from process_tools import drop, outcome
from promise_table import Tally

from kedit_daemon.home import Home
from memory.db.store import Store

__all__ = ["calm", "maker", "measured"]  # fixtures
pytestmark = pytest.mark.timeout(900)

CALLS = ("fdatasync", "fsync", "pwrite64", "rename")


@traced
@pytest.mark.parametrize("call", CALLS)
def test_the_daemon_ends_and_the_next_one_goes_on(
    call: str, calm: Any, maker: Maker, tmp_path: Path, tally: Tally, whole: bool
) -> None:
    last = {"fdatasync": 26, "fsync": 18, "pwrite64": 220, "rename": 8}[call]
    moments = range(1, last, -(-last // 6)) if whole else (last // 2,)
    bad, fired, checkpoints = [], 0, 0
    for n in moments:
        home = maker(tmp_path / str(n) / "home")
        drop(home)
        code, said = lived(home, f"{call}:error=EIO:when={n}")
        trace = (home.root.parent / "trace").read_text().splitlines()
        after = [i for i, line in enumerate(trace) if "(INJECTED)" in line]
        if after:
            fired += 1
            ended = code == 1 and "error[io]: /" in said and "hint:" in said
            ended &= "Traceback" not in said
            # Nothing is written once more as if it could be. (fdatasync is SQLite's, at its close:
            # of what it holds for committed, all had been synced before.)
            retried = [line for line in trace[after[0] + 1 :] if " fsync(" in line]
            if code == 0 and call in ("fdatasync", "pwrite64"):
                # A checkpoint that fails is SQLite's to do again: what it moves is safe elsewhere.
                checkpoints += 1
            elif not ended or retried:
                bad.append((n, code, said[-800:], retried))
            code, said = lived(home)
        if (code, outcome(home)) != (0, calm):
            bad.append((n, code, said[-1500:], []))
        intact(home)
    tally.tried(len(moments), bad=len(bad))
    assert bad == []
    assert fired > checkpoints


# Disks that cannot be written to --------------------------------------------------------------


READING = [["status"], ["facts"], ["show", "mine"], ["log"], ["log", "verify"], ["log", "export"]]


@root
def test_commands_on_a_read_only_home(tmp_path: Path, tally: Tally) -> None:
    with small_disk(tmp_path / "disk", "size=80m") as disk:  # room for a start, but for the rest
        home = make_home(disk / "home")
        subprocess.run(["mount", "-o", "remount,ro", "tmpfs", str(disk)], check=True)
        for words in READING:
            done = called(home, *words)
            assert done.exit_code in (0, 3), (words, done.output)
            assert "error[" not in done.output
        changing = [["init"], ["submit", "-"], ["run"]]
        for words in changing:
            done = called(home, *words, input=LINE)
            assert done.exit_code == 1, (words, done.output)
            clear(done.output, disk)
        done = called(Home(disk / "other"), "init")
        assert done.exit_code == 1
        clear(done.output, disk)
        tally.tried(len(READING) + len(changing) + 1)


LINE = '{"subject": "Oslo", "prompt": "{} is in", "target": "Norway"}\n'


def clear(output: str, place: Path) -> None:
    """An error that names what it is about, and what to do."""
    assert "Traceback" not in output and "unexpected" not in output, output
    assert "error[" in output and "hint:" in output and str(place) in output, output


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@root
@pytest.mark.parametrize("options", ["size=256k", "size=20m,nr_inodes=4", "size=20m,ro"])
def test_what_is_carried_away_is_whole_or_absent(options: str, tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    with closing(Store(home.database_file, lambda: NOW)) as store, store.db.transaction():
        for key in ("model", "base_hash"):
            store.db.set_meta(key, "x")
    with small_disk(tmp_path / "disk", options.removesuffix(",ro")) as disk:
        if options.startswith("size=256k"):
            fill(disk, 64 << 10)
        if options.endswith(",ro"):
            subprocess.run(["mount", "-o", "remount,ro", "tmpfs", str(disk)], check=True)
        before = names(disk)
        for words in (["backup", f"{disk}/backup"], ["export", "facts", f"{disk}/exports"]):
            done = called(home, *words)
            if done.exit_code == 0:  # facts are small
                assert words[0] == "export" and options.startswith("size=256k")
                continue
            assert done.exit_code == 1, (words, done.output)
            clear(done.output, disk)
            left = {n for n in names(disk) - before if n != "exports"}
            assert left == set()


@root
@pytest.mark.parametrize("replace", [True, False])
def test_a_restore_without_room_changes_nothing(replace: bool, tmp_path: Path) -> None:
    source = make_home(tmp_path / "home")
    assert called(source, "backup", str(tmp_path / "backup")).exit_code == 0
    with small_disk(tmp_path / "disk", "size=1m") as disk:
        home = make_home(disk / "home") if replace else Home(disk / "home")
        fill(disk, 40 << 10)
        before = {p: p.read_bytes() for p in disk.rglob("*") if p.is_file()}
        done = called(home, "restore", str(tmp_path / "backup"), *["--replace"] * replace)
        assert done.exit_code == 1, done.output
        clear(done.output, disk)
        after = {p: p.read_bytes() for p in disk.rglob("*") if p.is_file()}
        after.pop(home.lock_file, None)
        before.pop(home.lock_file, None)
        assert after == before
        assert not list(home.root.glob(".kedit-restore-*"))


@root
@pytest.mark.parametrize("full", ["size=16k", "size=1m,nr_inodes=3", "size=1m,nr_inodes=10"])
def test_a_home_that_does_not_fit(full: str, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", full) as disk:
        if full == "size=16k":
            fill(disk)
        done = called(Home(disk / "home"), "init")
        assert done.exit_code == 1, done.output
        clear(done.output, disk)
        assert not (disk / "home/config.toml").exists()
        (disk / "ballast").unlink(missing_ok=True)
