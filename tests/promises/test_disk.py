"""A full disk ends nothing: no work is taken, questions are answered, and it goes on by itself."""

import json
import os
import sqlite3
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from command_line import called, read
from disk_lives import (
    Maker,
    calm,
    hand_in,
    intact,
    lived,
    maker,
    measured,
    paused,
    running,
    settled,
    status,
)
from faulty_disk import Forked, fill, remove, root, small_disk, traced
from process_tools import FACTS, drop, outcome, query, record
from promise_table import Tally

from kedit_daemon.config import Config
from kedit_daemon.home import Home
from kedit_daemon.ingest.inbox import Inbox
from kedit_daemon.ingest.intake import Intake
from kedit_daemon.system.disk import is_disk_full
from memory.db.store import Store

__all__ = ["calm", "maker", "measured"]  # fixtures
pytestmark = pytest.mark.timeout(900)


@root
@pytest.mark.parametrize("left", [0, 4 << 20], ids=["nothing left", "some left"])
def test_no_work_is_taken_until_there_is_room(left: int, maker: Maker, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=100m") as disk:
        home = maker(disk / "home")
        with running(home) as process:
            assert hand_in(home, 0).exit_code == 0
            process.wait(lambda: settled(home, 1))
            fill(disk, left)
            process.wait(lambda: paused(home))
            code, found = status(home)
            assert code == 4 and found["paused"] == "disk full"
            given = hand_in(home, 1)
            if left:
                assert given.exit_code == 0
            else:
                assert given.exit_code == 1 and str(home.inbox_folder) in given.output
                assert "No space left" in given.output and "free some space" in given.output
            waiting = [p.name for p in home.inbox_folder.iterdir() if p.is_file()]
            assert len(waiting) == bool(left)
            asked = called(home, "ask", FACTS[0].question)
            assert (asked.exit_code, asked.stdout.strip()) == (0, FACTS[0].target)
            for words in (["flush"], ["audit"], ["consolidate"], ["revert", FACTS[0].id, "--yes"]):
                refused = called(home, *words)
                assert refused.exit_code == 75 and "disk full" in refused.output, words
            assert settled(home, 1) and not process.ended()
            remove(disk)
            if not left:
                process.wait(lambda: not paused(home))
                assert hand_in(home, 1).exit_code == 0
            process.wait(lambda: settled(home, 2))
            assert status(home)[1]["paused"] is None
            assert process.stop() == 0
        kinds = [k for (k,) in query(home, "SELECT kind FROM events")]
        assert ("paused" in kinds) == ("resumed" in kinds) and "daemon_stopped" in kinds
        intact(home)


@root
def test_no_more_files_fit(maker: Maker, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=200m,nr_inodes=600") as disk:
        home = maker(disk / "home")
        with running(home) as process:
            (disk / "many").mkdir()
            names = [disk / "many" / str(n) for n in range(os.statvfs(disk).f_favail)]
            for path in names:
                with suppress(OSError):  # the daemon may have taken the last ones
                    path.touch()
            process.wait(lambda: paused(home))
            assert "files" in status(home)[1]["paused"]
            assert hand_in(home, 0).exit_code == 1
            assert [p for p in home.inbox_folder.iterdir() if p.is_file()] == []
            for path in names:
                path.unlink(missing_ok=True)
            process.wait(lambda: not paused(home))
            assert hand_in(home, 0).exit_code == 0
            process.wait(lambda: settled(home, 1))
            assert process.stop() == 0
        intact(home)


@root
def test_a_file_that_does_not_fit_waits(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=4m") as disk:
        home = Home(disk / "home")
        home.create_folders()
        lines = [{**record(FACTS[0]), "subject": f"{n}-" * 25} for n in range(500)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (home.inbox_folder / "many.jsonl").write_text(text)
        inbox = Inbox(home.inbox_folder, 0.0, 1 << 20, lambda: datetime.now(UTC))
        with closing(Store(home.database_file, lambda: datetime.now(UTC))) as store:
            intake = Intake(store, inbox, Config())
            (claim,) = inbox.claim_files(0.0)
            fill(disk)
            with pytest.raises(sqlite3.Error) as caught:
                intake.take_file(claim)
            assert is_disk_full(caught.value)
            assert [p for p in home.inbox_folder.glob("*/*") if p.name[0] != "."] == [
                home.inbox_folder / "work" / claim.work_name
            ]
            assert store.list_facts() == []
            remove(disk)
            for claim in inbox.pending_claims():
                intake.take_file(claim)
            assert len(store.list_facts()) == len(lines)
            assert [p.name for p in (home.inbox_folder / "done").iterdir()] == ["many.jsonl"]


@root
def test_a_stop_while_nothing_fits_is_a_stop(maker: Maker, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=100m") as disk:
        home = maker(disk / "home")
        with running(home) as process:
            assert hand_in(home, 0).exit_code == 0
            process.wait(lambda: settled(home, 1))
            fill(disk)
            process.wait(lambda: paused(home))
            assert process.stop() == 0
            assert "Traceback" not in process.said()
        remove(disk)
        intact(home)
        with running(home) as process:
            asked = called(home, "ask", FACTS[0].question)
            assert asked.stdout.strip() == FACTS[0].target


def waiting(home: Home, left: int) -> Forked:
    """A daemon that has looked for room and found none."""
    process = Forked(home)
    before = process.said().count("Waiting for disk space")
    process.wait(lambda: process.said().count("Waiting for disk space") > before or process.ended())
    assert not process.ended(), process.said()
    said = called(home, "status", "--json")
    if left:
        assert said.exit_code == 4 and read(said)["state"] == "paused"
    else:  # nobody can read, since SQLite needs a page of its own for that
        assert said.exit_code == 1 and "error[disk-full]" in said.output
        assert "free some space" in said.output
    return process


@root
@pytest.mark.parametrize("left", [0, 4 << 20], ids=["nothing left", "some left"])
def test_a_start_waits_for_room(left: int, maker: Maker, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=100m") as disk:
        home = maker(disk / "home")
        with running(home) as process:
            assert hand_in(home, 0).exit_code == 0
            process.wait(lambda: settled(home, 1))
            assert process.stop() == 0
        fill(disk, left)
        process = waiting(home, left)
        try:
            assert process.stop() == 0
            process = waiting(home, left)
            remove(disk)
            process.wait(lambda: home.socket_file.exists() or process.ended())
            asked = called(home, "ask", FACTS[0].question)
            assert asked.stdout.strip() == FACTS[0].target
        finally:
            assert process.stop() == 0
        intact(home)


@traced
def test_what_does_not_fit_is_done_when_it_does(
    calm: Any, maker: Maker, tmp_path: Path, tally: Tally, whole: bool
) -> None:
    """Some calls in a row fail, wherever in the life, though the disk has room by its figures."""
    moments = {"pwrite64": [110], "rename": [2], "fsync": [5]}
    if whole:
        moments = {
            "pwrite64": [*range(5, 230, 9)],
            "rename": [1, 2, 3, 4],
            "fsync": [*range(1, 14)],
        }
    bad, lives = [], 0
    for call, n in ((call, n) for call, places in moments.items() for n in places):
        home = maker(tmp_path / f"{call}{n}" / "home")
        drop(home)
        code, said = lived(home, f"{call}:error=ENOSPC:when={n}..{n + 3}")
        if code == 1 and "hint:" in said and "ready" not in said:
            code, said = lived(home)  # a start needs some room
        lives += "Pausing all work" in said
        if (code, outcome(home)) != (0, calm) or "Traceback" in said:
            bad.append((call, n, code, said[-300:]))
        intact(home)
    tally.tried(sum(map(len, moments.values())), bad=len(bad))
    assert bad == []
    assert lives
