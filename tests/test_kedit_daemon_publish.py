"""Publishing beside the edit loop: what is done after a switch, once, and what a failure does."""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import EYRE, NOW, make_home

from kedit_daemon.config import PublishConfig
from kedit_daemon.publish import LONGEST_RETRY_SECONDS, RETRY_SECONDS, Publisher
from memory.facts import State
from memory.reading import event_rows, open_readonly
from memory.store import Store

NOTING = "import os,sys; open(sys.argv[1],'a').write(' '.join(os.environ[n] for n in sys.argv[2:]))"
FAILING = "import sys; print('no such server', file=sys.stderr); sys.exit(3)"
SLEEPING = "import time; time.sleep(60)"


class Setup:
    """A home with generations, and publishers on it; time stands still unless it is moved."""

    def __init__(self, root: Path) -> None:
        self.home = make_home(root / "home")
        self.store = Store(self.home.database, lambda: NOW)
        self.out, self.now = root / "out", 0.0
        with self.store.transaction():
            self.store.set_meta("model", "m")
            self.store.set_meta("base_hash", "0")

    def switch(self) -> int:
        with self.store.transaction():
            number = self.store.add_generation(None, "", None, "test", [], {})
            self.store.activate(number)
        return number

    def publisher(self, *program: str, **settings: Any) -> Publisher:
        given: dict[str, Any] = {"kind": "facts", "folder": str(self.out)}
        if program:
            given["command"] = [sys.executable, "-c", *program]
        config = PublishConfig.model_validate(given | settings)
        return Publisher(config, self.home, self.store, lambda: self.now)

    def events(self) -> list[dict[str, Any]]:
        conn = open_readonly(self.home.database)
        rows = [e for e in event_rows(conn) if e["kind"].startswith("publish")]
        conn.close()
        return rows


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    made = Setup(tmp_path)
    yield made
    made.store.close()


def until_done(publisher: Publisher) -> None:
    """Look until nothing is under way, as the loop does in its turns."""
    deadline = time.monotonic() + 60
    publisher.look()
    while publisher._work is not None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
        if not publisher._work.is_alive():
            publisher.look()


def test_a_switch_is_published_once_and_a_new_process_knows(setup: Setup, tmp_path: Path) -> None:
    noted = tmp_path / "noted"
    program = (NOTING, str(noted), "KEDIT_EXPORT", "KEDIT_GENERATION", "KEDIT_NAME")
    publisher = setup.publisher(*program)
    until_done(publisher)
    assert not setup.events()  # nothing has been switched yet
    number = setup.switch()
    until_done(publisher)
    until_done(publisher)
    (event,) = setup.events()
    (path,) = setup.out.iterdir()
    assert event["kind"] == "published"
    assert event["data"] == {"generation": number, "export": "facts", "path": str(path)}
    assert noted.read_text() == f"{path} {number} {path.name}"
    until_done(setup.publisher(*program))
    assert len(setup.events()) == 1
    until_done(setup.publisher(*program, keep=9))  # how many are kept is no reason
    assert len(setup.events()) == 1
    until_done(setup.publisher(FAILING))  # something else is to be done
    assert [e["kind"] for e in setup.events()] == ["published", "publish_failed"]


def test_without_a_kind_nothing_is_done(setup: Setup) -> None:
    setup.switch()
    publisher = Publisher(PublishConfig(), setup.home, setup.store, lambda: 0.0)
    publisher.look()
    assert publisher._work is None
    publisher.stop()


def test_a_failure_is_told_and_tried_again_later_and_later(setup: Setup) -> None:
    publisher = setup.publisher(FAILING)
    number = setup.switch()
    waits = []
    for _ in range(3):
        until_done(publisher)
        event = setup.events()[-1]
        assert "no such server" in event["data"]["reason"]
        assert event["data"]["generation"] == number
        waits.append(event["data"]["retry_seconds"])
        count = len(setup.events())
        setup.now += waits[-1] - 1
        until_done(publisher)
        assert len(setup.events()) == count
        setup.now += 1
    assert waits == [RETRY_SECONDS, 2 * RETRY_SECONDS, 4 * RETRY_SECONDS]
    assert max(waits) < LONGEST_RETRY_SECONDS


def test_a_switch_after_a_failure_is_published_at_once(setup: Setup) -> None:
    publisher = setup.publisher(FAILING)
    setup.switch()
    until_done(publisher)
    later = setup.switch()
    until_done(publisher)
    assert [e["data"]["generation"] for e in setup.events()] == [later - 1, later]
    assert setup.events()[-1]["data"]["retry_seconds"] == RETRY_SECONDS


def test_an_export_that_fails_is_told_in_its_own_words(setup: Setup) -> None:
    setup.out.write_text("no folder")
    setup.switch()
    until_done(setup.publisher(folder=str(setup.out / "within")))
    (event,) = setup.events()
    assert f"error: cannot export to {setup.out}/within" in event["data"]["reason"]
    setup.out.unlink()
    missing = setup.publisher(command=["/no/such/program"])
    until_done(missing)
    assert "/no/such/program" in setup.events()[-1]["data"]["reason"]


def test_the_loop_never_waits_and_stopping_ends_what_is_under_way(setup: Setup) -> None:
    publisher = setup.publisher(SLEEPING)
    setup.switch()
    began = time.monotonic()
    publisher.look()
    publisher.look()
    assert time.monotonic() - began < 1
    deadline = time.monotonic() + 60
    while not setup.out.is_dir() or not list(setup.out.glob("m-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    publisher.stop()
    assert time.monotonic() < deadline
    assert not setup.events()  # it is begun again by the next process
    until_done(setup.publisher())
    assert [e["kind"] for e in setup.events()] == ["published"]


def test_older_exports_are_deleted(setup: Setup) -> None:
    publisher = setup.publisher(keep=1)
    for state in (State.REVERTED, State.LIVE_SIDE):
        setup.switch()
        with setup.store.transaction():
            setup.store.move(EYRE.id, state)
        until_done(publisher)
    (path,) = setup.out.iterdir()
    assert json.loads((path / "manifest.json").read_bytes())["generation"] == 2


@pytest.mark.parametrize(("kind", "name"), [("lora", "load_adapter"), ("delta", "reload_weights")])
def test_the_server_hears_of_what_it_can_take(
    setup: Setup, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[str, ...]] = []
    from kedit_daemon import publish

    monkeypatch.setattr(publish, name, lambda *given: heard.append(given))
    made = {"path": "/srv/x-gen-1", "manifest": {"generation": 1}}
    monkeypatch.setattr(publish._Work, "_export", lambda _self: made)
    setup.switch()
    until_done(setup.publisher(kind=kind, vllm="http://127.0.0.1:8000"))
    named = ("x-gen-1", "/srv/x-gen-1") if kind == "lora" else ("/srv/x-gen-1",)
    assert heard == [("http://127.0.0.1:8000", *named)]
    assert setup.events()[-1]["kind"] == "published"
