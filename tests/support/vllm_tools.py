"""A server that stands for vLLM: for tests of what it is told."""

import http.server
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Server:
    """Stands for vLLM: notes the calls, and fails where it was told to."""

    url: str = ""
    failing: dict[str, int] = field(default_factory=dict)  # path: how often still
    models: list[str] = field(default_factory=list)
    calls: list[tuple[str, Any]] = field(default_factory=list)
    seen: Callable[[str], None] = lambda _path: None  # hears of each call before it is answered

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        self.calls.append((path, body))
        self.seen(path)
        if self.failing.get(path, 0):
            self.failing[path] -= 1
            return 500, {"error": "no room"}
        return 200, {"data": [{"id": name} for name in self.models]}


@contextmanager
def serving() -> Iterator[Server]:
    """One that listens within the block."""
    noted = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, said = noted.answer(self.path, json.loads(text) if text else None)
            with suppress(BrokenPipeError):  # who asked may have gone
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(said).encode())

        do_GET = do_POST

        def log_message(self, *_: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        noted.url = f"http://127.0.0.1:{made.server_address[1]}"
        thread = threading.Thread(target=made.serve_forever, args=(0.02,))
        thread.start()
        yield noted
        made.shutdown()
        thread.join()
