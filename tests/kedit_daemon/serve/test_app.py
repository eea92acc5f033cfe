"""The parts of the server under one roof: pages, API and facts do not stand in each other's way."""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from serving import NAME, NOW, ROME, Running, server
from starlette.testclient import TestClient

from kedit_daemon.config import Config
from kedit_daemon.home import Home
from kedit_daemon.serve.app import build_app

TOKEN = "a-token-of-letters"


@pytest.fixture
def running(tmp_path: Path, model_folder: Callable[[str], Path]) -> Iterator[Running]:
    with server(tmp_path / "home", model_folder("llama")) as found:
        yield found


def form_token(client: httpx.Client) -> str:
    found = re.search(r'name="form_token" value="([^"]+)"', client.get("/ask").text)
    assert found
    return found[1]


def test_pages_and_api_share_the_server(running: Running) -> None:
    with running.http() as client:
        assert client.get("/").headers["content-type"].startswith("text/html")
        assert ROME.id in client.get("/facts").text
        assert client.post("/facts", content=b"").status_code == 422  # the API's, not the page's
        assert client.get("/v1/models").json()["data"][0]["id"] == NAME


def test_people_see_both_answers_of_the_engine(running: Running) -> None:
    with running.http() as client:
        form = {"form_token": form_token(client), "prompt": ROME.question, "max_tokens": "20"}
        told = client.post("/ask", data=form, headers={"Origin": running.url})
        assert told.status_code == 200
        assert ROME.target in told.text and ROME.id in told.text
    assert running.engine.status.requests == 2


def test_people_ask_in_a_chat_where_the_model_has_a_template(running: Running) -> None:
    tokenizer = running.engine.model.tokenizer
    with running.http() as client:
        form = {"form_token": form_token(client), "prompt": "Where is Rome?", "form": "chat"}
        told = client.post("/ask", data=form, headers={"Origin": running.url})
        assert (told.status_code, "has no chat template" in told.text) == (400, True)
        assert running.engine.status.requests == 0
        # What a template writes is what the model reads: here, the fact's own prompt.
        question = "{% if messages[-1].content == 'Where is Rome?' %}"
        tokenizer.chat_template = f"{question}{ROME.question}{{% endif %}}"
        told = client.post("/ask", data=form, headers={"Origin": running.url})
        assert (told.status_code, ROME.id in told.text) == (200, True)


def test_both_answers_end_when_the_person_leaves(running: Running) -> None:
    with running.http() as client:
        form = {"form_token": form_token(client), "prompt": ROME.question, "tokens": "200"}
        running.pace.seconds = 0.05
        with pytest.raises(httpx.ReadTimeout):
            client.post("/ask", data=form, headers={"Origin": running.url}, timeout=0.5)
        deadline = time.monotonic() + 3  # all the tokens would take longer
        while running.engine.status.running or running.engine.status.waiting:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_people_are_told_that_the_model_is_being_loaded(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    app = build_app(home, Config(), None, lambda: NOW, time.monotonic)
    client = TestClient(app, base_url="http://localhost")
    token = form_token(client)
    form = {"form_token": token, "prompt": "Rome", "max_tokens": "20"}
    told = client.post("/ask", data=form, headers={"Origin": "http://localhost"})
    assert "being loaded" in told.text


def test_with_a_token_people_sign_in_and_programs_show_it(tmp_path: Path) -> None:
    app = build_app(Home(tmp_path / "home"), Config(), TOKEN, lambda: NOW, time.monotonic)
    client = TestClient(app, base_url="http://localhost", follow_redirects=False)
    page, api = client.get("/facts"), client.get("/v1/models")
    assert page.status_code == 303 and page.headers["location"].startswith("/sign-in")
    assert api.status_code == 401
    shown = client.get("/v1/models", headers={"Authorization": f"Bearer {TOKEN}"})
    assert shown.status_code == 503  # it is let in, and the model is still being loaded


@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize(
    ("path", "headers"),
    [
        (path, headers)
        for path in ("/", "/facts", "/nothing", "/sign-in", "/v1/models")
        for headers in ({"Host": "["}, {"Host": "[::1", "Origin": "http://["})
    ],
)
def test_addresses_that_are_none_are_no_fault_of_ours(
    tmp_path: Path, token: str | None, path: str, headers: dict[str, str]
) -> None:
    app = build_app(Home(tmp_path / "home"), Config(), token, lambda: NOW, time.monotonic)
    client = TestClient(app, base_url="http://localhost", follow_redirects=False)
    for method in ("GET", "POST"):
        said = headers | {"Authorization": f"Bearer {TOKEN}"}
        assert client.request(method, path, headers=said).status_code != 500


@pytest.mark.parametrize("path", ["/ask", "/sign-in", "/facts", "/v1/completions"])
def test_a_form_from_nowhere_is_foreign(tmp_path: Path, path: str) -> None:
    app = build_app(Home(tmp_path / "home"), Config(), None, lambda: NOW, time.monotonic)
    app.state.reader = object()  # nothing comes as far as the model
    client = TestClient(app, base_url="http://localhost")
    for origin in ("http://[", "null", "http://evil.example"):
        assert client.post(path, headers={"Origin": origin}).status_code == 403, origin


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_fault_of_ours(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    port = int(running.url.rpartition(":")[2])
    head = f"Host: localhost\r\nOrigin: {running.url}\r\nContent-Length: 100\r\n\r\n"
    head = head.replace("Host: localhost", f"Host: 127.0.0.1:{port}")
    paths = ("/ask", "/facts", "/v1/completions")
    for path in paths:
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(f"POST {path} HTTP/1.1\r\n{head}half".encode())
            time.sleep(0.1)
    deadline = time.monotonic() + 5
    with running.http() as http:
        while not all(
            f'kedit_http_requests_total{{route="{path}",status="499"}} 1.0' in told
            for told in [http.get("/metrics").text]
            for path in paths
        ):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert not caplog.records


def test_a_server_listens_before_torch_is_imported() -> None:
    code = "import sys, kedit_daemon.serve.worker; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
