"""HTTP/1.1 over a Unix socket, between commands and the running daemon.

    POST /<name>   a JSON object of arguments  ->  200 and a JSON object
                   refused                     ->  4xx and {error, code, hint, exit_code}

The server's threads do no work: a request waits in a queue until the edit loop has answered it.
"""

import http.client
import http.server
import json
import logging
import os
import queue
import re
import socket
import socketserver
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memory.errors import BadRequest, KeditError, NotRunning, RefusedByDaemon

PING = "ping"  # the command that checks for a listener, answered by the server itself
MAX_BODY_BYTES = 16 << 20  # a picture of the largest size, as a data URL
MAX_ADDRESS_BYTES = 103  # the longest address of a Unix socket on any system
IDLE_TIMEOUT_SECONDS = 30.0  # after which a silent client is disconnected
STOP_TIMEOUT_SECONDS = 5.0  # for the last replies to be read
_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ControlRequest:
    """A command that waits for the edit loop. Only the first answer or refusal counts."""

    name: str
    arguments: dict[str, Any]
    reply_queue: queue.Queue[tuple[int, bytes]] = field(default_factory=lambda: queue.Queue(1))

    def send_answer(self, result: dict[str, Any]) -> None:
        """Answer the command."""
        self._put_reply(200, result)

    def send_refusal(self, error: KeditError) -> None:
        """Refuse the command, which then fails with this error."""
        self._put_reply(409, _error_as_dict(error))

    def _put_reply(self, status: int, content: dict[str, Any]) -> None:
        with suppress(queue.Full):
            self.reply_queue.put_nowait((status, json.dumps(content).encode()))


def _error_as_dict(error: KeditError) -> dict[str, Any]:
    return {
        "error": str(error),
        "code": error.code,
        "hint": error.hint,
        "exit_code": error.exit_code,
    }


@contextmanager
def _socket_address(path: Path) -> Iterator[str]:
    """Yield the path, or a short path to the same file where it is too long for an address."""
    if len(os.fsencode(path)) <= MAX_ADDRESS_BYTES:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class ControlServer:
    """A server that puts the requests from its socket into the queue `requests`.

    Start it only while holding the home's lock: an existing socket is taken for a leftover and
    replaced.
    """

    def __init__(self, path: Path) -> None:
        # Reentrant: a signal handler may put into it, whatever it interrupts.
        self.requests: queue.SimpleQueue[ControlRequest] = queue.SimpleQueue()
        self._socket_path = path
        self._server: _SocketServer | None = None

    def start(self) -> None:
        """Start to listen; only the owner of the process may connect."""
        with suppress(FileNotFoundError):
            if not stat.S_ISSOCK(self._socket_path.lstat().st_mode):
                raise KeditError(
                    f"{self._socket_path} is in the way", hint="move that file elsewhere"
                )
            self._socket_path.unlink()
        self._server = _SocketServer(self._socket_path, self.requests)
        threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="control", daemon=True
        ).start()

    def stop(self) -> None:
        """Stop listening, refuse every unanswered request, and wait until replies are read."""
        if self._server is None:
            return
        self._server.shutdown()
        self._server.server_close()
        self._socket_path.unlink(missing_ok=True)
        self._server.drain_requests()
        self._server = None


class _SocketServer(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True  # a command that waits must not keep a failed daemon alive
    request_queue_size = 64

    def __init__(self, path: Path, requests: queue.SimpleQueue[ControlRequest]) -> None:
        self._socket_path = path
        self._requests = requests
        self._condition = threading.Condition()  # guards the three below
        self._connections: set[socket.socket] = set()
        self._waiting_requests: set[ControlRequest] = set()
        self._is_stopping = False
        super().__init__(str(path), _RequestHandler)

    def server_bind(self) -> None:
        with _socket_address(self._socket_path) as address:
            self.socket.bind(address)
        self._socket_path.chmod(0o600)  # nobody can connect before this: it does not listen yet

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._condition:
            self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self._condition:
            self._connections.discard(request)
            self._condition.notify_all()

    def handle_error(self, request: Any, client_address: Any) -> None:
        level = logging.DEBUG if isinstance(sys.exc_info()[1], ConnectionError) else logging.ERROR
        _log.log(level, "A control connection broke.", exc_info=True)

    def await_reply(self, name: str, arguments: dict[str, Any]) -> tuple[int, bytes]:
        """Wait for the edit loop's reply to one request."""
        request = ControlRequest(name, arguments)
        with self._condition:
            if self._is_stopping:
                request.send_refusal(NotRunning("the daemon is stopping"))
            else:
                self._waiting_requests.add(request)
                self._requests.put(request)
        reply = request.reply_queue.get()
        with self._condition:
            self._waiting_requests.discard(request)
        return reply

    def drain_requests(self) -> None:
        """Refuse the waiting requests, and wait a little for the replies to be read."""
        with self._condition:
            self._is_stopping = True
            for request in self._waiting_requests:
                request.send_refusal(NotRunning("the daemon is stopping"))
            for connection in self._connections:
                with suppress(OSError):  # the client may have gone
                    connection.shutdown(socket.SHUT_RD)
            self._condition.wait_for(lambda: not self._connections, STOP_TIMEOUT_SECONDS)


class _RequestHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE_TIMEOUT_SECONDS
    server: _SocketServer

    def do_POST(self) -> None:
        try:
            name, arguments = self._parse_name(), self._parse_arguments()
        except KeditError as error:
            self._send_refusal(400, error)
            return
        if name == PING:  # answered here, however busy the edit loop is
            self._send_reply(200, b"{}")
        else:
            self._send_reply(*self.server.await_reply(name, arguments))

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Send an error of the protocol itself as JSON, too."""
        text = message or http.HTTPStatus(code).phrase
        self._send_refusal(code, BadRequest(text, hint="POST /<name> with JSON"))

    def log_message(self, format: str, *args: Any) -> None:
        _log.debug(format, *args)

    def _send_refusal(self, status: int, error: KeditError) -> None:
        self.close_connection = True  # the rest of the request is not read
        self._send_reply(status, json.dumps(_error_as_dict(error)).encode())

    def _send_reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _parse_name(self) -> str:
        if match := re.fullmatch(r"/([a-z][a-z0-9_-]*)", self.path):
            return match[1]
        raise BadRequest(f"no command {self.path!r}")

    def _parse_arguments(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,9}", length) or int(length) > MAX_BODY_BYTES:
            raise BadRequest(f"Content-Length must be given and at most {MAX_BODY_BYTES}")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise BadRequest("the body ended too early")
        try:
            arguments = json.loads(body or b"{}")
            json.dumps(arguments, ensure_ascii=False).encode()  # no store takes a lone surrogate
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"the body is not JSON: {error}") from error
        if not isinstance(arguments, dict):
            raise BadRequest("the body must be a JSON object")
        return arguments


class _SocketConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._socket_path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        with _socket_address(self._socket_path) as address:
            self.sock.connect(address)


def send_request(
    path: Path, name: str, arguments: dict[str, Any], timeout: float | None = None
) -> dict[str, Any]:
    """Return the running daemon's answer to a command. Raises its refusals as RefusedByDaemon.

    Without a timeout (seconds) it waits as long as the daemon runs.
    """
    body = json.dumps(arguments).encode()
    if len(body) > MAX_BODY_BYTES:
        raise KeditError(
            f"{name}: the arguments take {len(body)} bytes, more than {MAX_BODY_BYTES}",
            code="too-large",
            hint="hand in less at once",
        )
    status, reply = _exchange_json(path, name, body, timeout)
    if status == 200:
        return reply
    raise RefusedByDaemon(
        reply.get("error", f"refused with status {status}"),
        reply.get("code", "failed"),
        reply.get("hint", ""),
        reply.get("exit_code", 1),
    )


def _exchange_json(
    path: Path, name: str, body: bytes, timeout: float | None
) -> tuple[int, dict[str, Any]]:
    connection = _SocketConnection(path, timeout)
    try:
        connection.request("POST", f"/{name}", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise NotRunning("daemon not running") from error
    except PermissionError as error:
        raise KeditError(
            f"{path} may not be used by this user",
            code="no-permission",
            hint="run the command as the user that the daemon runs as",
        ) from error
    except TimeoutError as error:
        raise KeditError(
            f"no answer to {name} within {timeout} s",
            code="timeout",
            hint="the daemon is busy: see kedit-daemon status, then try again",
        ) from error
    except (ConnectionError, http.client.IncompleteRead) as error:
        raise NotRunning("the daemon ended before it had answered") from error
    except (http.client.HTTPException, ValueError) as error:
        problem = f"the process that listens on {path} is not a kedit-daemon"
        raise KeditError(problem, code="bad-reply") from error
    finally:
        connection.close()
