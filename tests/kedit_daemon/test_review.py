"""The review desk against a real home's database, as datasette reads it."""

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import EYRE, NOW, OSLO, make_home
from paths import ROOT

from kedit_daemon.home import Home
from memory.db.queries import open_readonly
from memory.db.store import Store
from memory.facts import FactState

DESK = yaml.safe_load((ROOT / "kedit_daemon/review.yaml").read_text())
KEDIT = DESK["databases"]["kedit"]
ASKED = {"fact": "mine", "state": "live-weights"}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path / "home")


@pytest.fixture
def store(home: Home) -> Iterator[Store]:
    """A live one: what it has just written stands in the write-ahead log."""
    store = Store(home.database_file, lambda: NOW)
    with store.db.transaction():
        store.db.write_event(
            "record_failed", file="f.jsonl", line=3, problem="no target", remedy="add it"
        )
        store.change_state(EYRE.id, FactState.REVERTED, reason="quarantined: norm", after="Egypt")
        store.add_audit(0, "warn", {"norm_ratio": {"4": 1.01, "5": 1.5}}, ["a", "b"], 0.5)
    yield store
    store.close()


def rows(home: Home, name: str) -> list[dict[str, Any]]:
    with closing(open_readonly(home.database_file)) as conn:
        return [dict(row) for row in conn.execute(KEDIT["queries"][name]["sql"], ASKED)]


@pytest.mark.parametrize("name", list(KEDIT["queries"]))
def test_every_query_runs(home: Home, store: Store, name: str) -> None:
    found = rows(home, name)
    assert bool(found) == (name != "today"), found  # the home's events are of another day
    assert KEDIT["queries"][name].keys() == {"title", "description", "sql"}
    assert name not in KEDIT["tables"]  # which could not be opened any more


def test_what_the_queries_tell(home: Home, store: Store) -> None:
    assert [row["about"] for row in rows(home, "failures")] == [
        "Lake Eyre: Australia",
        "f.jsonl line 3",
    ]
    assert rows(home, "reverts")[0]["answer_since"] == "Egypt"
    assert [row["became"] for row in rows(home, "history")] == [None, "live-side", "reverted"]
    assert [row["id"] for row in rows(home, "facts_in_state")] == [OSLO.id]
    audit = rows(home, "audit_figures")[0]
    assert (audit["norm_ratio"], audit["why"]) == (1.5, "a; b")
    with closing(sqlite3.connect(home.database_file)) as conn:
        head = conn.execute("SELECT max(seq), hash FROM events").fetchone()
    assert tuple(rows(home, "log_head")[0][key] for key in ("events", "hash")) == head


def test_today_is_this_day(home: Home) -> None:
    from datetime import UTC, datetime

    store = Store(home.database_file, lambda: datetime.now(UTC))
    with store.db.transaction():
        store.change_state(EYRE.id, FactState.REVERTED, reason="wrong", after="Egypt")
    store.close()
    (event,) = rows(home, "today")
    assert (event["subject"], event["after"], event["why"]) == ("Lake Eyre", "Egypt", "wrong")


def test_every_table_and_column_is_described_and_is_there(home: Home) -> None:
    with closing(open_readonly(home.database_file)) as conn:
        names = {row[0] for row in conn.execute("SELECT name FROM pragma_table_list")}
        names = {name for name in names if not name.startswith("sqlite_")}
        assert set(KEDIT["tables"]) == names
        for name, said in KEDIT["tables"].items():
            columns = [row["name"] for row in conn.execute(f"PRAGMA table_info({name})")]
            assert said.get("hidden") or set(said["columns"]) == set(columns), name
            assert set(said.get("facets", ())) <= set(columns)
            assert {said.get("sort_desc", columns[0])} <= set(columns)
    assert {name for name, said in KEDIT["tables"].items() if said.get("hidden")} == {
        *("terms", "side_keys", "_sqlite_migrations")
    }


@pytest.mark.filterwarnings("default")  # they are datasette's own
def test_datasette_shows_it_and_cannot_change_it(home: Home, store: Store) -> None:
    app = pytest.importorskip("datasette.app")

    async def visit() -> None:
        desk = app.Datasette([str(home.database_file)], metadata=DESK)
        for name in KEDIT["queries"]:
            found = await desk.client.get(
                f"/kedit/{name}.json", params={"_shape": "array", **ASKED}
            )
            assert found.status_code == 200, found.text
            assert found.json() == rows(home, name)
        page = (await desk.client.get("/kedit")).text
        for title in ("What changed today", "Reverts, and why", "3 hidden tables"):
            assert title in page
        facts = (await desk.client.get("/kedit/facts")).text
        assert "What the model shall answer" in facts
        attempt = {"sql": "delete from facts", "_shape": "array"}
        assert (await desk.client.get("/kedit.json", params=attempt)).status_code == 400
        for database in desk.databases.values():
            database.close()

    asyncio.run(visit())
    with closing(open_readonly(home.database_file)) as conn:
        assert conn.execute("SELECT count(*) FROM facts").fetchone()[0] == 3
