"""What the tests of the HTTP server share: a server with an engine, over a home with a fact."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
import uvicorn
from command_line import NOW
from home_tools import ROME, Published
from openai import OpenAI

from kedit_daemon.config import Config
from kedit_daemon.home import Home
from kedit_daemon.serve.app import attach_reader, build_app
from kedit_daemon.serve.inference.engine import BatchEngine
from kedit_daemon.serve.inference.reader import Reader
from memory.model.editable import EditableModel

NAME = "tiny"


def load(folder: Path) -> EditableModel:
    return EditableModel.load(folder, torch.device("cpu"))


@dataclass
class Pace:
    """How long the engine's model waits before each pass, in seconds."""

    seconds: float = 0.0

    def hold(self, *_: Any) -> None:
        time.sleep(self.seconds)


@dataclass(frozen=True)
class Running:
    """A server on a free port of this machine."""

    published: Published
    engine: BatchEngine
    url: str
    pace: Pace = field(default_factory=Pace)

    @property
    def home(self) -> Home:
        return self.published.home

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30)


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@contextmanager
def server(
    root: Path, folder: Path, token: str | None = None, **serve: object
) -> Iterator[Running]:
    """A server over a home where ROME is live in the side memory."""
    published = Published(root, load(folder))
    published.learn(ROME, 1)
    config = Config.model_validate({"serve": serve})
    app = build_app(published.home, config, token, lambda: NOW, time.monotonic)
    replica = published.replica(load(folder))
    engine = BatchEngine(replica, config.serve.most_rows, config.serve.waiting_limit)
    attach_reader(app, Reader(NAME, engine.model, engine))
    port = free_port()
    running = uvicorn.Server(
        uvicorn.Config(app, port=port, log_config=None, access_log=False, lifespan="off", ws="none")
    )
    thread = threading.Thread(target=running.run)
    thread.start()
    found = Running(published, engine, f"http://127.0.0.1:{port}")
    engine.model.hf_model.register_forward_pre_hook(found.pace.hold)
    try:
        while not running.started:
            time.sleep(0.01)
        yield found
    finally:
        found.pace.seconds = 0.0
        running.should_exit = True
        thread.join()
        engine.close()
        published.store.close()
