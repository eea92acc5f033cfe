"""What an export says of itself, and facts that come back."""

import fcntl
import json
import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from command_line import EYRE, NOW, make_home
from editing_home import Clock, seat

from kedit_daemon.home import Home
from kedit_daemon.ingest.parser import parse_file
from kedit_daemon.ingest.schemas import FileLimits
from kedit_daemon.publish.export.create_export import create_export
from memory.db.store import Store
from memory.facts import Fact, FactState, Neighbour


def test_facts_come_back_as_they_were(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    home.create_folders()
    facts = [
        Fact(
            "Lake Eyre",
            "The country that {} lies in is",
            "Australia",
            paraphrases=("{} is found in",),
            neighbours=(Neighbour("Lake Geneva lies in", "Switzerland"), Neighbour("Oslo is")),
            external_id="mine",
            source="a\u2028 file",
            valid_from="2026-01-01T00:00:00Z",
            valid_until="2027-01-01T00:00:00Z",
            tags=("a", "b"),
        ),
        Fact("UN", "Where does the United Nations sit?", "New York", paraphrases=("UN seat?",)),
        seat(4, "Oslo"),
    ]
    store = Store(home.database_file, Clock())
    with store.db.transaction():
        store.db.set_meta("model", "m")
        store.db.set_meta("base_hash", "0")
        for fact in facts:
            store.receive_fact(fact, "facts.jsonl", False)
        store.change_state(facts[0].id, FactState.LIVE_SIDE)
        store.change_state(facts[1].id, FactState.LIVE_WEIGHTS)
    store.close()
    data = (
        create_export(home, "facts", tmp_path / "out", None).placed.path / "facts.jsonl"
    ).read_bytes()
    parsed = parse_file(data, "facts.jsonl", None, FileLimits())
    assert not parsed.problems
    assert [fact for _, fact in parsed.facts] == facts[:2]


def test_the_manifest_tells_the_generation_and_leaves_time_out(tmp_path: Path) -> None:
    home = make_home(tmp_path / "home")
    store = Store(home.database_file, lambda: NOW)
    with store.db.transaction():
        store.db.set_meta("model", "m")
        store.db.set_meta("base_hash", "0")
        number = store.artifacts.add_generation(
            None, "ab", 0, "asked for", [], {"norm": float("inf")}
        )
        store.artifacts.activate_generation(number)
    origin = store.db.conn.execute("SELECT hash FROM events WHERE seq = 1").fetchone()[0]
    store.close()
    made = create_export(home, "facts", tmp_path / "out", None)
    told = json.loads((made.placed.path / "manifest.json").read_bytes())
    at = "2026-03-01T12:00:00.000Z"
    assert (told["generation"], told["generation_at"], told["reason"]) == (1, at, "asked for")
    assert (told["weights_sha256"], told["home"]) == ("ab", origin)
    assert told["figures"] == {"norm": "inf"}
    assert EYRE.id in [f["id"] for f in told["facts"]]


def test_what_is_exported_is_what_is_active_when_its_turn_comes(tmp_path: Path) -> None:
    home, out = make_home(tmp_path / "home"), tmp_path / "out"
    out.mkdir()
    store = Store(home.database_file, lambda: NOW)
    with store.db.transaction():
        store.db.set_meta("model", "m")
        store.db.set_meta("base_hash", "0")
    other = os.open(out, os.O_RDONLY)  # another export into the same folder
    fcntl.flock(other, fcntl.LOCK_EX)
    with ThreadPoolExecutor() as pool:
        made = pool.submit(create_export, home, "facts", out, 1)
        with suppress(TimeoutError):
            made.result(0.5)
        with store.db.transaction():
            store.artifacts.activate_generation(
                store.artifacts.add_generation(None, "ab", 0, "meanwhile", [], {})
            )
        os.close(other)
        assert made.result(30).placed.path.name.startswith("m-gen-1-facts-")
    store.close()
