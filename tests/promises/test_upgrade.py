"""A database of any earlier version is taken on whole; one of a newer version is left alone."""

import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from command_line import called, process, read
from editing_home import Bench
from paths import TESTS
from sqlite_utils import Database

from kedit_daemon.home import Home
from memory.db import event_log, schema
from memory.db.queries import open_readonly
from memory.db.store import Store
from memory.errors import KeditError
from memory.facts import FactState, fact_from_json

FIRST = (TESTS / "data/first_schema.sql").read_text(encoding="utf-8")
HEAD = (18, "e7aaf4f273fa40ff6a73af24d1b9e870088d4e3248c002d8bcca069e410d006a")
TABLES = [
    "submissions",
    "facts",
    "edits",
    "terms",
    "side_keys",
    "shards",
    "generations",
    "audits",
    "job_run",
    "meta",
    "events",
]


def now() -> datetime:
    return datetime(2027, 1, 1, tzinfo=UTC)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.create_folders()
    home.config_file.write_text("")
    with closing(sqlite3.connect(home.database_file)) as conn:
        conn.executescript(FIRST)
    return home


def contents(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    with closing(sqlite3.connect(path)) as conn:
        return {t: conn.execute(f"SELECT * FROM {t} ORDER BY 1").fetchall() for t in TABLES}


def tables(conn: sqlite3.Connection) -> dict[str, str]:
    """How everything was made, whatever the spaces."""
    rows = conn.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    return {name: re.sub(r"\s+", " ", sql) for name, sql in rows}


def newer(path: Path) -> None:
    """What a later version leaves that was killed: its change lies in the log beside the file."""
    source = path.with_name("source.db")
    with closing(Database(path, execute_plugins=False).conn) as conn:
        conn.execute("PRAGMA journal_mode=WAL")
        row = "(2, 'kedit', 'm002_later', '2030-01-01')"
        conn.execute("BEGIN")
        conn.execute(f"INSERT INTO _sqlite_migrations VALUES {row}")
        conn.execute("ALTER TABLE facts ADD COLUMN mood TEXT")
        conn.execute("COMMIT")
        for end in ("", "-wal"):
            shutil.copy(f"{path}{end}", f"{source}{end}")
    for end in ("", "-wal"):
        shutil.move(f"{source}{end}", f"{path}{end}")


def test_the_first_step_makes_what_the_first_version_made(tmp_path: Path) -> None:
    """A change of the tables is a step more, never a change of a step."""
    with closing(sqlite3.connect(":memory:")) as first, closing(sqlite3.connect(":memory:")) as now:
        first.executescript(FIRST)
        schema.m001_first(Database(now, execute_plugins=False))
        made = tables(first)
        assert tables(now) == {n: sql for n, sql in made.items() if "_sqlite_migrations" not in n}
    assert schema.MIGRATION_STEPS[0] is schema.m001_first


def test_a_database_of_the_first_version_keeps_all_it_has(home: Home) -> None:
    before = contents(home.database_file)
    with closing(Store(home.database_file, now)) as store:
        facts = store.list_facts()
        assert [f.state for f in facts] == [
            *(FactState.RECEIVED, FactState.LIVE_SIDE, FactState.SUPERSEDED, FactState.REVERTED),
            *(FactState.EXPIRED, FactState.REJECTED, FactState.FAILED),
        ]
        records = {row[0]: fact_from_json(row[6]) for row in before["facts"]}
        assert {f.id: f.fact for f in facts} == records
        assert {f.fact.id for f in facts} == records.keys()
        assert event_log.verify_chain(store.db.conn, HEAD) == event_log.ChainVerdict(
            True, *(18, *HEAD), ""
        )
        assert store.find_fact("mine") == facts[0]
        assert facts[0].fact.source == "Atlas \u2014 page 7"
    after = contents(home.database_file)
    for table in TABLES:
        width = len(before[table][0]) if before[table] else 0
        assert [row[:width] for row in after[table]] == before[table], table


def test_its_commands_read_it(home: Home) -> None:
    assert called(home, "log", "verify").stdout.startswith("intact: 18 events")
    assert len(read(called(home, "facts", "--json"))) == 7
    assert "Atlas" in called(home, "show", "mine").stdout
    assert called(home, "status", "--json").exit_code == 3


def test_a_daemon_goes_on_with_it(home: Home, bench: Callable[..., Bench]) -> None:
    at = bench("home", side={"steps": 300}, routing={"flush_facts": 10})
    at.settle()
    states = {f.fact.subject: f.state for f in at.store.list_facts()}
    assert states["country 1"] == states["country 2"] == FactState.LIVE_SIDE
    assert at.says("The seat of country 1 is").strip().startswith("Rome")
    assert at.says("The seat of country 2 is").strip().startswith("Oslo")
    assert states["country 4"] == FactState.REVERTED
    verdict = event_log.verify_chain(at.store.db.conn, HEAD)
    assert (verdict.intact, verdict.events > 18) == (True, True)


def test_a_newer_database_is_refused_and_not_touched(home: Home) -> None:
    newer(home.database_file)
    files = [home.database_file, home.database_file.with_name("kedit.db-wal")]
    before = [path.read_bytes() for path in files]
    assert all(before)
    with pytest.raises(KeditError, match="newer version: it has m002_later"):
        Store(home.database_file, now)
    assert [path.read_bytes() for path in files] == before
    with (home.root / "said").open("wb") as said, process(home, "run", stderr=said) as daemon:
        assert daemon.wait(60) == 78
    assert b"error[newer-database]: " in (home.root / "said").read_bytes()
    assert [path.read_bytes() for path in files] == before
    with closing(open_readonly(home.database_file)) as conn:
        assert "mood" in {row[1] for row in conn.execute("PRAGMA table_info(facts)")}
