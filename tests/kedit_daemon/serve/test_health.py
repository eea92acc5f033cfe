"""Whether the server lives, and whether it can answer."""

import time
from collections.abc import Callable
from pathlib import Path

from command_line import NOW
from home_tools import Published
from serving import NAME, load, server
from starlette.testclient import TestClient

from kedit_daemon.config import Config
from kedit_daemon.control import ControlServer
from kedit_daemon.home import Home
from kedit_daemon.serve.app import attach_reader, build_app
from kedit_daemon.serve.inference.engine import BatchEngine
from kedit_daemon.serve.inference.reader import Reader


def test_ready_is_who_has_a_model_and_a_daemon_however_busy(
    tmp_path: Path, model_folder: Callable[[str], Path]
) -> None:
    with server(tmp_path / "home", model_folder("llama")) as running, running.http() as http:
        assert http.get("/health").json() == {"status": "ok"}
        answer = http.get("/ready")
        assert answer.status_code == 503
        assert answer.json() == {
            "ready": False,
            "reasons": ["daemon not running"],
            "generation": 0,
            "problems": [],
        }
        control = ControlServer(running.home.socket_file)  # nobody takes what it puts on its queue
        control.start()
        answer = http.get("/ready")
        assert (answer.status_code, answer.json()["ready"]) == (200, True)
        control.stop()
        assert http.get("/ready").status_code == 503


def test_a_server_lives_while_its_model_is_being_loaded(
    tmp_path: Path, model_folder: Callable[[str], Path]
) -> None:
    app = build_app(Home(tmp_path / "home"), Config(), None, lambda: NOW, time.monotonic)
    client = TestClient(app, base_url="http://localhost")
    assert client.get("/health").status_code == 200
    assert "the model is being loaded" in client.get("/ready").json()["reasons"]
    answer = client.post("/v1/completions", json={"model": NAME, "prompt": "Rome"})
    assert answer.status_code == 503
    assert int(answer.headers["retry-after"]) > 0
    assert client.get("/metrics").status_code == 200
    published = Published(tmp_path / "home", load(model_folder("llama")))
    engine = BatchEngine(published.replica(load(model_folder("llama"))), 2, 2)
    attach_reader(app, Reader(NAME, engine.model, engine))
    assert "the model is being loaded" not in client.get("/ready").json()["reasons"]
    assert client.get("/v1/models").status_code == 200
    engine.close()
    published.store.close()
