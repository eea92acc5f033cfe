"""Publishing beside the edit loop: what is done after a switch, once, and what a failure does."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import EYRE, NOW, make_home
from vllm_tools import Server, serving

from kedit_daemon.config import PublishConfig
from kedit_daemon.publish.export.folder import place_export
from kedit_daemon.publish.export.source import read_source
from kedit_daemon.publish.publisher import (
    MAX_RETRY_SECONDS,
    RETRY_SECONDS,
    Publisher,
    _PublishAttempt,
)
from memory.db import meta_keys
from memory.db.queries import fetch_events, open_readonly
from memory.db.store import Store
from memory.facts import FactState

NOTING = "import os,sys; open(sys.argv[1],'a').write(' '.join(os.environ[n] for n in sys.argv[2:]))"
FAILING = "import sys; print('no such server', file=sys.stderr); sys.exit(3)"
SLEEPING = "import time; time.sleep(60)"


class Setup:
    """A home with generations, and publishers on it; time stands still unless it is moved."""

    def __init__(self, root: Path) -> None:
        self.home = make_home(root / "home")
        self.store = Store(self.home.database_file, lambda: NOW)
        self.out, self.now = root / "out", 0.0
        with self.store.db.transaction():
            self.store.db.set_meta("model", "m")
            self.store.db.set_meta("base_hash", "0")

    def switch(self, *fact_ids: str) -> int:
        with self.store.db.transaction():
            number = self.store.artifacts.add_generation(None, "", None, "test", fact_ids, {})
            self.store.artifacts.activate_generation(number)
        return number

    def publisher(self, *program: str, **settings: Any) -> Publisher:
        given: dict[str, Any] = {"kind": "facts", "folder": str(self.out)}
        if program:
            given["command"] = [sys.executable, "-c", *program]
        config = PublishConfig.model_validate(given | settings)
        return Publisher(config, self.home, self.store, lambda: self.now)

    def placed(self, kind: str, number: int) -> dict[str, Any]:
        """An export of a generation, with nothing in it, as the child process tells of it."""

        def fill(_to: Path) -> tuple[str, dict[str, Any]]:
            home = read_source(self.home).origin
            return f"m-gen-{number}-{kind}", {"kind": kind, "home": home, "generation": number}

        made = place_export(self.out, None, fill)
        return {"path": str(made.path), "manifest": made.manifest}

    def here(self) -> list[str]:
        return sorted(path.name for path in self.out.iterdir())

    def events(self) -> list[dict[str, Any]]:
        conn = open_readonly(self.home.database_file)
        rows = [e for e in fetch_events(conn) if e["kind"].startswith("publish")]
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
    publisher.poll_attempt()
    while publisher._attempt is not None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
        if not publisher._attempt.is_alive():
            publisher.poll_attempt()


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
    publisher.poll_attempt()
    assert publisher._attempt is None
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
    assert max(waits) < MAX_RETRY_SECONDS


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
    assert f"error[export]: cannot export to {setup.out}/within" in event["data"]["reason"]
    setup.out.unlink()
    missing = setup.publisher(command=["/no/such/program"])
    until_done(missing)
    assert "/no/such/program" in setup.events()[-1]["data"]["reason"]


def test_the_loop_never_waits_and_stopping_ends_what_is_under_way(setup: Setup) -> None:
    publisher = setup.publisher(SLEEPING)
    setup.switch()
    began = time.monotonic()
    publisher.poll_attempt()
    publisher.poll_attempt()
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
    for state in (FactState.REVERTED, FactState.LIVE_SIDE):
        setup.switch()
        with setup.store.db.transaction():
            setup.store.change_state(EYRE.id, state)
        until_done(publisher)
    (path,) = setup.out.iterdir()
    assert json.loads((path / "manifest.json").read_bytes())["generation"] == 2


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as made:
        yield made


@pytest.fixture
def quick(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports without a model in them."""
    monkeypatch.setattr(
        _PublishAttempt, "_run_export", lambda w: setup.placed(str(w.config.kind), w.generation)
    )


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["lora", "delta"])
def test_the_server_hears_of_what_it_can_take(setup: Setup, server: Server, kind: str) -> None:
    setup.switch(EYRE.id)
    until_done(setup.publisher(kind=kind, vllm=server.url))
    (path,) = setup.out.iterdir()
    told = {"lora_name": path.name, "lora_path": str(path)}
    if kind == "lora":
        assert server.calls == [("/v1/load_lora_adapter", told)]
    else:
        given = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
        assert server.calls[1] == ("/collective_rpc", given)
        assert server.paths[-1] == "/resume"
    assert setup.events()[-1]["kind"] == "published"


@pytest.mark.usefixtures("quick")
def test_an_adapter_is_deleted_when_the_next_is_served_and_it_is_not(
    setup: Setup, server: Server
) -> None:
    publisher = setup.publisher(kind="lora", vllm=server.url, keep=1)
    setup.switch(EYRE.id)
    until_done(publisher)
    (old,) = setup.here()
    there: list[list[str]] = []
    server.seen = lambda _path: there.append(setup.here())
    server.calls.clear()
    setup.switch(EYRE.id)
    until_done(publisher)
    (new,) = setup.here()
    assert [(path, body["lora_name"]) for path, body in server.calls] == [
        ("/v1/load_lora_adapter", new),
        ("/v1/unload_lora_adapter", old),
    ]
    assert there == [sorted([old, new])] * 2
    server.failing = {"/v1/unload_lora_adapter": 1}
    server.models = [new]
    setup.switch(EYRE.id)
    until_done(publisher)
    assert [e["kind"] for e in setup.events()] == ["published"] * 3
    assert new not in setup.here()


@pytest.mark.usefixtures("quick")
def test_nothing_is_deleted_when_the_server_did_not_take_the_next(
    setup: Setup, server: Server
) -> None:
    publisher = setup.publisher(kind="lora", vllm=server.url, keep=1)
    setup.switch(EYRE.id)
    until_done(publisher)
    server.failing = {"/v1/load_lora_adapter": 1}
    setup.switch(EYRE.id)
    until_done(publisher)
    assert [e["kind"] for e in setup.events()] == ["published", "publish_failed"]
    assert len(setup.here()) == 2


@pytest.mark.usefixtures("quick")
def test_an_adapter_of_facts_that_are_gone_is_served_no_more(
    setup: Setup, server: Server, tmp_path: Path
) -> None:
    noted = tmp_path / "noted"
    program = (NOTING, str(noted), "KEDIT_EXPORT", "KEDIT_GENERATION", "KEDIT_NAME")
    publisher = setup.publisher(*program, kind="lora", vllm=server.url)
    setup.switch(EYRE.id)
    until_done(publisher)
    (name,) = setup.here()
    noted.unlink()
    server.models = [name]
    server.failing = {"/v1/unload_lora_adapter": 1}
    last = setup.switch()
    until_done(publisher)
    event = setup.events()[-1]
    assert (event["kind"], event["data"]["retry_seconds"]) == ("publish_failed", RETRY_SECONDS)
    assert setup.store.db.get_meta(meta_keys.PUBLISH_FAILED) == event["data"]["reason"]
    setup.now += RETRY_SECONDS
    until_done(publisher)
    assert server.calls[-1] == ("/v1/unload_lora_adapter", {"lora_name": name})
    event = setup.events()[-1]
    assert (event["kind"], event["data"]) == ("published", {"generation": last, "export": None})
    assert noted.read_text() == f" {last}  {last} "  # it was run twice
    assert setup.store.db.get_meta(meta_keys.PUBLISH_FAILED) is None
    count = len(server.calls)
    until_done(publisher)
    assert len(server.calls) == count


def test_an_adapter_for_llama_cpp_of_facts_that_are_gone_is_none(
    setup: Setup, tmp_path: Path
) -> None:
    noted = tmp_path / "noted"
    last = setup.switch()
    program = (NOTING, str(noted), "KEDIT_EXPORT", "KEDIT_GENERATION", "KEDIT_NAME")
    until_done(setup.publisher(*program, kind="gguf-lora"))
    event = setup.events()[-1]
    assert (event["kind"], event["data"]) == ("published", {"generation": last, "export": None})
    assert noted.read_text() == f" {last} "


def test_without_facts_and_a_folder_there_is_nothing_to_take_away(
    setup: Setup, server: Server
) -> None:
    setup.switch()
    until_done(setup.publisher(kind="lora", vllm=server.url))
    assert [e["kind"] for e in setup.events()] == ["published"]
    assert not server.calls


def test_a_failure_is_forgotten_when_nothing_is_to_be_published(setup: Setup) -> None:
    setup.switch()
    until_done(setup.publisher(FAILING))
    assert "no such server" in (setup.store.db.get_meta(meta_keys.PUBLISH_FAILED) or "")
    Publisher(PublishConfig(), setup.home, setup.store, lambda: 0.0).poll_attempt()
    assert setup.store.db.get_meta(meta_keys.PUBLISH_FAILED) is None


@pytest.mark.usefixtures("quick")
def test_a_server_that_pauses_goes_on_when_the_daemon_stops(
    setup: Setup, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kedit_daemon.publish.publisher.STOP_SECONDS", 0.2)
    pausing, over = threading.Event(), threading.Event()

    def busy(path: str) -> None:
        if path.startswith("/pause"):
            pausing.set()
            over.wait(30)

    server.seen = busy
    setup.switch(EYRE.id)
    publisher = setup.publisher(kind="delta", vllm=server.url)
    publisher.poll_attempt()
    work = publisher._attempt
    assert work is not None and pausing.wait(30)
    publisher.stop()
    assert server.paths == ["/pause?mode=wait", "/resume"]
    over.set()
    work.join(30)
    assert server.paths == ["/pause?mode=wait", "/resume", "/resume"]  # and no weights
    assert not setup.events()


def test_packages_in_the_folder_of_the_caller_are_not_taken(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/__init__.py").write_text("raise SystemExit('not ours')")
    monkeypatch.chdir(tmp_path)
    setup.switch()
    until_done(setup.publisher())
    assert [e["kind"] for e in setup.events()] == ["published"]
