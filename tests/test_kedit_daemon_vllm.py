"""What a vLLM server hears, and what becomes of its refusals."""

import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from kedit_daemon import vllm
from kedit_daemon.vllm import load_adapter, reload_weights
from memory.errors import KeditError


@dataclass
class Server:
    """Stands for vLLM: notes the calls, and fails where it was told to."""

    url: str = ""
    failing: dict[str, int] = field(default_factory=dict)  # path: how often still
    models: list[str] = field(default_factory=list)
    calls: list[tuple[str, Any]] = field(default_factory=list)

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        self.calls.append((path, body))
        if self.failing.get(path, 0):
            self.failing[path] -= 1
            return 500, {"error": "no room"}
        return 200, {"data": [{"id": name} for name in self.models]}


@pytest.fixture
def server() -> Iterator[Server]:
    noted = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, said = noted.answer(self.path, json.loads(text) if text else None)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(said).encode())

        do_GET = do_POST

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        noted.url = f"http://127.0.0.1:{made.server_address[1]}"
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield noted
        made.shutdown()
        thread.join()


def test_an_adapter_is_loaded_under_a_name_of_its_own(server: Server) -> None:
    load_adapter(server.url, "m-gen-3-lora-ab", "/srv/m-gen-3-lora-ab")
    told = {"lora_name": "m-gen-3-lora-ab", "lora_path": "/srv/m-gen-3-lora-ab"}
    assert server.calls == [("/v1/load_lora_adapter", told)]


def test_an_adapter_that_is_there_already_is_no_failure(server: Server) -> None:
    server.failing = {"/v1/load_lora_adapter": 2}
    server.models = ["base", "a"]
    load_adapter(server.url, "a", "/srv/a")
    assert server.paths == ["/v1/load_lora_adapter", "/v1/models"]
    with pytest.raises(KeditError, match=r"load_lora_adapter answered 500.*no room"):
        load_adapter(server.url, "b", "/srv/b")


def test_weights_are_laid_over_while_the_server_pauses(server: Server) -> None:
    reload_weights(server.url, "/srv/x")
    assert server.calls == [
        ("/pause?mode=wait", None),
        (
            "/collective_rpc",
            {"method": "reload_weights", "kwargs": {"weights_path": "/srv/x"}},
        ),
        ("/reset_prefix_cache", None),
        ("/resume", None),
    ]


@pytest.mark.parametrize("failing", ["/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache"])
def test_the_server_goes_on_where_a_step_failed(server: Server, failing: str) -> None:
    server.failing = {failing: 1}
    with pytest.raises(KeditError, match="answered 500"):
        reload_weights(server.url, "/srv/x")
    assert server.paths[-2:] == [failing, "/resume"]


def test_resuming_is_tried_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.time, "sleep", lambda _seconds: None)
    server.failing = {"/resume": 2}
    reload_weights(server.url, "/srv/x")
    assert server.paths[-3:] == ["/resume"] * 3
    server.failing = {"/resume": 3}
    with pytest.raises(KeditError, match="may stand still"):
        reload_weights(server.url, "/srv/x")


def test_a_server_that_is_not_there(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.time, "sleep", lambda _seconds: None)
    with pytest.raises(KeditError, match=r"127\.0\.0\.1:9"):
        load_adapter("http://127.0.0.1:9", "a", "/srv/a")
    with pytest.raises(KeditError, match="may stand still"):
        reload_weights("http://127.0.0.1:9", "/srv/a")
