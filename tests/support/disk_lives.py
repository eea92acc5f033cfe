"""Lives of a daemon on a disk that fails, and what they leave."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command_line import called, read
from faulty_disk import Forked
from process_tools import FACTS, drop, make_home, outcome, query, record

from kedit_daemon.editing.model_loading import load_model
from kedit_daemon.home import Home
from memory.db import queries
from memory.db.event_log import read_head, verify_chain


@pytest.fixture(scope="module")
def measured(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path of the measured statistics of the model, copied into every home."""
    folder = tmp_path_factory.mktemp("measured")
    load_model(str(model_folder("llama")), "cpu", folder, iter)
    (path,) = folder.glob("statistics-*")
    return path


Maker = Callable[[Path], Home]


@pytest.fixture(scope="module")
def maker(model_folder: Callable[[str], Path], measured: Path) -> Maker:
    def make(folder: Path) -> Home:
        home = make_home(folder, model_folder("llama"))
        (home.state_folder / measured.name).write_bytes(measured.read_bytes())
        return home

    return make


def hand_in(home: Home, number: int) -> Any:
    line = json.dumps(record(FACTS[number]))
    return called(home, "submit", "-", input=line)


def settled(home: Home, facts: int) -> bool:
    states = dict(query(home, "SELECT state, count(*) FROM facts GROUP BY state"))
    return sum(states.values()) == facts and "received" not in states


@contextmanager
def running(home: Home, inject: str = "") -> Iterator[Forked]:
    process = Forked(home, inject)
    try:
        process.wait(lambda: home.socket_file.exists() or process.ended())
        yield process
    finally:
        process.stop()


@pytest.fixture(scope="module")
def calm(maker: Maker, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The end of a run that is left in peace."""
    home = maker(tmp_path_factory.mktemp("calm") / "home")
    drop(home)
    with running(home) as process:
        process.wait(lambda: settled(home, len(FACTS)))
        assert process.stop() == 0
    return outcome(home)


def intact(home: Home) -> None:
    connection = queries.open_readonly(home.database_file)
    try:
        found = verify_chain(connection, read_head(home.head_file))
    finally:
        connection.close()
    assert found.intact, found.problem
    assert list((home.inbox_folder / "work").iterdir()) == []
    assert list((home.inbox_folder / "failed").iterdir()) == []


def status(home: Home) -> tuple[int, Any]:
    said = called(home, "status", "--json")
    return said.exit_code, read(said)


def paused(home: Home) -> bool:
    return bool(status(home)[1]["state"] == "paused")


def lived(home: Home, inject: str = "") -> tuple[int, str]:
    """One life, until all is done or it ends; its exit code and what it said."""
    with running(home, inject) as process:
        process.wait(lambda: process.ended() or settled(home, len(FACTS)))
        return process.stop(), process.said()
