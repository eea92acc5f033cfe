"""What has failed, and for which nothing is to be done, is settled by a person."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from command_line import called, read

from kedit_daemon.control import ControlServer
from kedit_daemon.editing.editor import Editor
from kedit_daemon.editing.fact_lifecycle import Lifecycle
from kedit_daemon.home import Home
from kedit_daemon.report.status import gather_status
from memory.db.store import Store
from memory.errors import KeditError
from memory.facts import Fact, FactState

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path)
    home.create_folders()
    return home


def leave(home: Home, name: str, content: str | None = "{bad\n") -> Path:
    folder = home.inbox_folder / "failed"
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.error.json").write_text('{"errors": [{"line": 1, "problem": "no"}]}')
    if content is not None:
        (folder / name).write_text(content)
    return folder


def test_the_report_of_a_file_is_removed_and_its_records_stay(home: Home) -> None:
    folder = leave(home, "a.jsonl")
    leave(home, "b.jsonl", None)
    result = called(home, "dismiss", "a.jsonl", "--dry-run")
    assert (result.exit_code, result.stdout) == (0, "a.jsonl\n")
    assert "1 would be dismissed" in result.stderr
    assert len(list(folder.iterdir())) == 3
    assert read(called(home, "dismiss", "b.jsonl", "a.jsonl", "--json"))["dismissed"] == [
        "b.jsonl",
        "a.jsonl",
    ]
    assert [path.name for path in folder.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize("name", ["../secret", "x", "a.jsonl.error.json"])
def test_other_names_dismiss_nothing(home: Home, name: str) -> None:
    leave(home, "a.jsonl")
    (home.inbox_folder / "secret.error.json").write_text("{}")
    assert called(home, "dismiss", "a.jsonl", name).exit_code == 3  # asked of a daemon: a fact
    assert (home.inbox_folder / "secret.error.json").exists()
    assert (home.inbox_folder / "failed/a.jsonl.error.json").exists()


def test_names_or_all_are_wanted(home: Home) -> None:
    assert called(home, "dismiss").exit_code == 2
    assert called(home, "dismiss", "a", "--all").exit_code == 2
    leave(home, "a.jsonl")
    leave(home, "two words")
    result = called(home, "dismiss", "--all")
    assert (result.exit_code, result.stdout) == (0, "a.jsonl\ntwo words\n")


class Desk(Editor):
    """An editor without a model, for what needs none."""

    def __init__(self, store: Store) -> None:
        self.store, self.lifecycle = store, Lifecycle(store, 3)


@contextmanager
def answering(home: Home, desk: Desk) -> Iterator[None]:
    server = ControlServer(home.socket_file)
    server.start()

    def answer() -> None:
        request = server.requests.get()
        try:
            request.send_answer(desk.dismiss(request.arguments["facts"], False))
        except KeditError as error:
            request.send_refusal(error)

    threading.Thread(target=answer, daemon=True).start()
    try:
        yield
    finally:
        server.stop()


def fact(number: int) -> Fact:
    return Fact(f"Lake {number}", "{} lies in", "Chad", external_id="mine" if number < 3 else None)


def test_failed_and_quarantined_facts_are_settled_and_may_come_again(home: Home) -> None:
    store = Store(home.database_file, lambda: NOW)
    states = {
        1: (FactState.FAILED, "does not answer"),
        2: (FactState.REVERTED, "quarantined: alone it is too much"),
        3: (FactState.REVERTED, "reverted by hand"),
        4: (FactState.LIVE_SIDE, None),
        5: (FactState.FAILED, None),
    }
    with store.db.transaction():
        for number, (state, reason) in states.items():
            store.receive_fact(fact(number), "a.jsonl", False)
            store.change_state(fact(number).id, state, reason=reason)
    desk = Desk(store)
    assert len(gather_status(home, NOW, {}, "k")["failed_facts"]) == 3
    for number in (3, 4):
        with pytest.raises(KeditError, match="there is nothing to dismiss"):
            desk.dismiss([fact(5).id, fact(number).id], False)
    assert desk.dismiss(["mine"], True)["dismissed"] == [fact(1).id, fact(2).id]
    assert len(gather_status(home, NOW, {}, "k")["failed_facts"]) == 3
    assert desk.dismiss(["mine"], False)["dismissed"] == [fact(1).id, fact(2).id]
    (left,) = gather_status(home, NOW, {}, "k")["failed_facts"]
    assert left["id"] == fact(5).id
    settled = store.require_fact(fact(1).id)
    assert settled.state is FactState.REVERTED
    assert settled.reason == "dismissed by hand; before: does not answer"
    with pytest.raises(KeditError, match="nothing to dismiss"):
        desk.dismiss(["mine"], False)
    with store.db.transaction():
        assert store.receive_fact(fact(1), "b.jsonl", False).state is FactState.RECEIVED
    store.close()


def test_all_means_facts_and_files(home: Home) -> None:
    store = Store(home.database_file, lambda: NOW)
    with store.db.transaction():
        store.receive_fact(fact(1), "a.jsonl", False)
        store.change_state(fact(1).id, FactState.FAILED, reason="no")
    leave(home, "a.jsonl")
    store.close()
    asked = []

    class Told(Desk):
        def dismiss(self, names: list[str], dry_run: bool) -> dict[str, object]:
            asked.extend(names)
            return {"dismissed": names, "dry_run": dry_run}

    with answering(home, Told(store)):
        seen = read(called(home, "dismiss", "--all", "--json"))
    assert seen["dismissed"] == [fact(1).id, "a.jsonl"] and asked == [fact(1).id]
    assert json.dumps(seen)
