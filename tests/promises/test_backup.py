"""A backup taken at any moment of the work can be restored, and then comes to the same end."""

import os
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from command_line import called
from command_line import make_home as settled_home
from editing_home import Bench
from process_tools import FACTS, at_rest, drop, finish, make_home, outcome, started
from promise_table import Tally
from tiny_models import save_model

from kedit_daemon.home import Home
from kedit_daemon.maintenance.backup import Backup, create_backup
from kedit_daemon.maintenance.restore import restore
from kedit_daemon.system.orphans import RESTORE_PREFIX
from memory.db.event_log import read_head, verify_chain
from memory.db.queries import open_readonly
from memory.facts import FactState

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def rows(home: Home, sql: str) -> list[tuple[Any, ...]]:
    with closing(open_readonly(home.database_file)) as conn:
        return [tuple(row) for row in conn.execute(sql)]


def states(home: Home) -> dict[str, int]:
    return dict(rows(home, "SELECT state, count(*) FROM facts GROUP BY state"))


def intact(home: Home) -> bool:
    with closing(open_readonly(home.database_file)) as conn:
        return verify_chain(conn, read_head(home.head_file)).intact


@contextmanager
def backed_up_at_every_step(at: Bench, to: Path) -> Iterator[list[Backup]]:
    """While the editor works, a backup is taken whenever it lets others in between."""
    made: list[Backup] = []

    def take() -> None:
        states_now = [f.state for f in at.store.list_facts()]
        name = f"{len(made)}"
        made.append(create_backup(at.home, to / name, NOW))
        assert made[-1].manifest["facts"] == {s: states_now.count(s) for s in set(states_now)}

    for part in (at.editor.flush, at.editor.side_learner):
        part.pulse = take
    yield made
    take()


@pytest.mark.parametrize("direct", [True, False])
def test_a_backup_at_every_step_of_an_edit_comes_to_the_same_end(
    direct: bool, bench: Callable[..., Bench], tmp_path: Path
) -> None:
    settings = {"side": {"steps": 300}, "routing": {"flush_facts": 3}}
    at = bench("home", **settings)
    at.receive(*FACTS[: 6 if direct else 3], direct=direct)
    with backed_up_at_every_step(at, tmp_path / "backups") as made:
        at.settle()
    end = [(f.id, f.state) for f in at.store.list_facts()]
    assert {state for _, state in end} == {FactState.LIVE_WEIGHTS}
    assert len(made) > 3
    for number in {0, len(made) // 2, len(made) - 2, len(made) - 1}:
        name, backup = f"restored{number}", made[number]
        home = Home(tmp_path / name)
        restore(home, backup.path, False, NOW)
        assert intact(home)
        back = bench(name, **settings)
        assert states(home) == backup.manifest["facts"]
        generation = back.store.artifacts.get_generation(back.store.artifacts.active_generation())
        assert generation.id == backup.manifest["generation"]
        if generation.id:
            assert back.weights_hash() == generation.weights_hash
        back.settle()
        assert [(f.id, f.state) for f in back.store.list_facts()] == end
        assert back.weights_hash() == at.weights_hash()
        assert intact(home)


@pytest.mark.timeout(200)
@pytest.mark.whole
def test_backups_of_a_daemon_at_work_come_to_its_end(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home", save_model("llama", tmp_path / "model"))
    drop(home)
    process = started(home)
    dests = []
    while not at_rest(home):
        dests.append(tmp_path / f"backup{len(dests)}")
        result = called(home, "backup", str(dests[-1]))
        assert (result.exit_code, result.stdout) == (0, f"{dests[-1]}\n"), result.output
    finish(home, process)
    kept = [sum(states(Home(dest)).values()) for dest in dests]
    first = kept.index(len(FACTS))  # all of the file is in it; nothing may be learned yet
    again = Home(tmp_path / "again")
    assert called(again, "restore", str(dests[first])).exit_code == 0
    assert called(again, "log", "verify").exit_code == 0
    assert rows(again, "SELECT id, state FROM facts") == rows(
        Home(dests[first]), "SELECT id, state FROM facts"
    )
    finish(again, started(again))
    assert outcome(again) == outcome(home)
    assert intact(again)


def killed_at(change: int, home: Home, source: Path) -> bool:
    """Restore in a process that is gone before its so-manieth link, rename or removal of a folder;
    whether it came so far."""
    pid = os.fork()
    if not pid:
        left = iter(range(change))

        def gone(event: str, _: object) -> None:
            if event in ("os.rename", "os.link", "shutil.rmtree") and next(left, None) is None:
                os._exit(9)

        sys.addaudithook(gone)
        restore(home, source, True, NOW)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def refused(home: Home) -> None:
    called(home, "doctor", "--fix")  # mends no such thing, and does not hide it
    for command in ("init", "calibrate", "run"):
        result = called(home, command)
        assert result.exit_code == 78
        assert "was cut off" in result.output


def test_a_restore_that_is_killed_anywhere_is_old_or_new_or_said_to_be_cut_off(
    tmp_path: Path, tally: Tally
) -> None:
    backup = create_backup(settled_home(tmp_path / "origin"), tmp_path / "backup", NOW).path
    new = Home(backup).database_file.read_bytes()
    ends = []
    while True:
        home = settled_home(tmp_path / f"used{len(ends)}")
        with closing(sqlite3.connect(home.database_file)) as conn:
            conn.execute("PRAGMA user_version = 7")  # to tell it from what comes
        old = home.database_file.read_bytes()
        if not killed_at(len(ends), home, backup):
            break
        if home.database_file.exists():
            ends.append({old: "old", new: "new"}[home.database_file.read_bytes()])
        else:
            ends.append("cut off")
            refused(home)
            killed_at(0, home, backup)  # makes an empty `state` and no more
            refused(home)
        restore(home, backup, True, NOW + timedelta(minutes=1))
        assert home.database_file.read_bytes() == new
        assert not list(home.root.glob(f"{RESTORE_PREFIX}*"))
    tally.tried(len(ends), kills=len(ends))
    assert [*dict.fromkeys(ends)] == ["old", "cut off", "new"]
