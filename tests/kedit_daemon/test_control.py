"""Commands to the running daemon: what arrives, what comes back, what is refused."""

import http.client
import json
import queue
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kedit_daemon.control import MAX_BODY_BYTES, PING, ControlRequest, ControlServer, send_request
from memory.errors import KeditError, RefusedByDaemon


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ControlServer]:
    control = ControlServer(tmp_path / "control.sock")
    control.start()
    yield control
    control.stop()


@contextmanager
def edit_loop(server: ControlServer, act: Callable[[ControlRequest], None]) -> Iterator[None]:
    """A stand-in for the daemon's loop: takes requests until the block ends."""
    ended = threading.Event()

    def loop() -> None:
        while not ended.is_set():
            try:
                act(server.requests.get(timeout=0.02))
            except queue.Empty:
                continue

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def echo(request: ControlRequest) -> None:
    request.send_answer({"name": request.name, **request.arguments})


def raw(path: Path, data: bytes) -> tuple[int, dict[str, Any]]:
    """What the server replies to bytes that `call` would never send."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(10)
        client.connect(str(path))
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        response = http.client.HTTPResponse(client)
        response.begin()
        status, body = response.status, json.loads(response.read())
        response.close()
        return status, body


def post(path: Path, body: bytes, name: str = "flush") -> tuple[int, dict[str, Any]]:
    head = f"POST /{name} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return raw(path, head.encode() + body)


def test_arguments_arrive_and_the_answer_comes_back(tmp_path: Path, server: ControlServer) -> None:
    with edit_loop(server, echo):
        answer = send_request(tmp_path / "control.sock", "revert", {"ids": ["é"], "dry_run": True})
    assert answer == {"name": "revert", "ids": ["é"], "dry_run": True}


def test_a_ping_is_answered_without_the_edit_loop(tmp_path: Path, server: ControlServer) -> None:
    assert send_request(tmp_path / "control.sock", PING, {}, timeout=10) == {}
    assert server.requests.empty()


def test_a_refusal_is_the_same_error_on_the_other_side(
    tmp_path: Path, server: ControlServer
) -> None:
    error = RefusedByDaemon("no such fact", "unknown", "kedit-daemon facts", 4)
    with (
        edit_loop(server, lambda r: r.send_refusal(error)),
        pytest.raises(KeditError, match="no such fact") as caught,
    ):
        send_request(tmp_path / "control.sock", "revert", {})
    seen = caught.value
    assert (seen.code, seen.hint, seen.exit_code) == ("unknown", "kedit-daemon facts", 4)


def test_the_first_reply_counts() -> None:
    request = ControlRequest("flush", {})
    request.send_answer({"facts": 3})
    request.send_refusal(KeditError("too late"))
    assert request.reply_queue.get_nowait() == (200, b'{"facts": 3}')
    assert request.reply_queue.empty()


def test_requests_wait_side_by_side(tmp_path: Path, server: ControlServer) -> None:
    with ThreadPoolExecutor(8) as clients:
        calls = [
            clients.submit(send_request, tmp_path / "control.sock", "ask", {"n": n})
            for n in range(8)
        ]
        waiting = [server.requests.get(timeout=10) for _ in calls]
        for request in reversed(waiting):
            echo(request)
        assert [c.result(10)["n"] for c in calls] == list(range(8))


def test_only_the_owner_may_connect(tmp_path: Path, server: ControlServer) -> None:
    mode = (tmp_path / "control.sock").stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600


def test_without_a_daemon_the_exit_code_is_three(tmp_path: Path) -> None:
    leftover = tmp_path / "leftover.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(leftover))
    for path in (tmp_path / "none.sock", leftover):
        with pytest.raises(KeditError, match="daemon not running") as caught:
            send_request(path, "flush", {})
        assert (caught.value.exit_code, caught.value.hint) == (3, "kedit-daemon run")


def test_a_leftover_socket_is_replaced_and_anything_else_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))
    server = ControlServer(path)
    server.start()
    with edit_loop(server, echo):
        assert send_request(path, "audit", {}) == {"name": "audit"}
    server.stop()
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(KeditError, match="in the way"):
        ControlServer(path).start()
    assert path.read_text() == "precious"


def test_a_path_too_long_for_a_socket_still_works(tmp_path: Path) -> None:
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    server = ControlServer(folder / "control.sock")
    server.start()
    assert stat.S_IMODE((folder / "control.sock").stat().st_mode) == 0o600
    with edit_loop(server, echo):
        assert send_request(folder / "control.sock", "audit", {}) == {"name": "audit"}
    server.stop()
    assert list(folder.iterdir()) == []
    with pytest.raises(KeditError, match="daemon not running"):
        send_request(folder / "control.sock", "audit", {})


def test_stopping_refuses_what_still_waits(tmp_path: Path, server: ControlServer) -> None:
    path = tmp_path / "control.sock"
    with ThreadPoolExecutor(2) as clients:
        waiting: list[Future[dict[str, Any]]] = [
            clients.submit(send_request, path, "flush", {}) for _ in range(2)
        ]
        server.requests.get(timeout=10)  # one is taken and never answered
        server.requests.get(timeout=10)
        server.stop()
        for failed in waiting:
            error = failed.exception(10)
            assert isinstance(error, KeditError)
            assert "stopping" in str(error)
            assert error.exit_code == 3
    server.stop()  # a second time does no harm


def test_a_silent_client_does_not_delay_stopping(tmp_path: Path, server: ControlServer) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.connect(str(tmp_path / "control.sock"))
        silent.sendall(b"POST /fl")
        time.sleep(0.1)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 3


def test_a_client_that_gives_up_hears_why(tmp_path: Path, server: ControlServer) -> None:
    with pytest.raises(KeditError, match="no answer to flush") as caught:
        send_request(tmp_path / "control.sock", "flush", {}, timeout=0.05)
    assert caught.value.exit_code == 75
    server.requests.get(timeout=10).send_answer({})  # nobody reads it, and nothing breaks
    with edit_loop(server, echo):
        assert send_request(tmp_path / "control.sock", "audit", {}) == {"name": "audit"}


def test_a_daemon_that_dies_with_the_request_counts_as_not_running(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(path))
        listening.listen()
        with ThreadPoolExecutor(1) as clients:
            waiting = clients.submit(send_request, path, "flush", {})
            listening.accept()[0].close()
            error = waiting.exception(10)
    assert isinstance(error, KeditError)
    assert error.exit_code == 3


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[1]",
        b"null",
        b'{"a": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"[" * 100_000,
    ],
)
def test_a_wrong_body_is_refused(tmp_path: Path, server: ControlServer, body: bytes) -> None:
    status, reply = post(tmp_path / "control.sock", body)
    assert status == 400
    assert reply["code"] == "bad-request"
    assert server.requests.empty()


@pytest.mark.parametrize(
    "data",
    [
        b"POST /flush HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /flush HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /flush HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST /flush HTTP/1.1\r\nHost: x\r\nContent-Length: 1048577\r\n\r\n",
        b"POST /flush HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{}",
        b"POST /../x HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}",
        b"GET /status HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
    ],
)
def test_a_wrong_request_gets_json_and_reaches_nobody(
    tmp_path: Path, server: ControlServer, data: bytes
) -> None:
    status, reply = raw(tmp_path / "control.sock", data)
    assert 400 <= status < 600
    assert set(reply) == {"error", "code", "hint", "exit_code"}
    assert server.requests.empty()


def test_nonsense_does_no_harm(tmp_path: Path, server: ControlServer) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        client.settimeout(10)
        client.connect(str(tmp_path / "control.sock"))
        client.sendall(b"complete nonsense here and there\r\n\r\n")
        assert b"bad-request" in client.recv(4096)
    with edit_loop(server, echo):
        assert send_request(tmp_path / "control.sock", "audit", {}) == {"name": "audit"}


def test_too_much_is_refused_before_it_is_sent(tmp_path: Path, server: ControlServer) -> None:
    with pytest.raises(KeditError, match="more than") as caught:
        send_request(tmp_path / "control.sock", "ask", {"prompt": "x" * MAX_BODY_BYTES})
    assert caught.value.code == "too-large"
    assert server.requests.empty()


def test_one_connection_may_carry_several_requests(tmp_path: Path, server: ControlServer) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client, edit_loop(server, echo):
        client.settimeout(10)
        client.connect(str(tmp_path / "control.sock"))
        for name in ("first", "second"):
            client.sendall(f"POST /{name} HTTP/1.1\r\nContent-Length: 2\r\n\r\n{{}}".encode())
            response = http.client.HTTPResponse(client)
            response.begin()
            assert json.loads(response.read()) == {"name": name}
