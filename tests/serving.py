"""What the tests of the HTTP server share: a home with a history, a model, and a server on it."""

import asyncio
import math
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
import uvicorn
from command_line import NOW, make_home
from openai import OpenAI

from kedit_daemon.config import Config
from kedit_daemon.home import Home
from kedit_daemon.serve.app import build, equip
from kedit_daemon.serve.reader import Reader
from kedit_daemon.serve.wish import BASE, Opened, Part, Token, Wish
from memory.errors import KeditError
from memory.model import EditableModel
from memory.side import Match

NAME = "tiny"


@dataclass(frozen=True)
class Figures:
    requests: int = 3
    running: int = 2
    waiting: int = 1
    generation: int = 0
    problems: tuple[str, ...] = ("a shard is damaged",)


class PlainEngine:
    """Answers a wish at a time, greedily, without a cache. `fires`: a fact for every prompt that
    begins like it."""

    def __init__(self, model: EditableModel, fires: dict[str, Match]) -> None:
        self.model, self.fires = model, fires
        self.closed = False
        self.running = 0
        self.pause = 0.0  # seconds before each token

    async def answer(self, wish: Wish) -> AsyncIterator[Opened | Part]:
        if len(wish.ids) + wish.max_tokens > self.model.positions:
            raise KeditError("the prompt is too long", code="too-long")
        if wish.which not in ("edited", BASE, 0):
            raise KeditError(f"there is no generation {wish.which}", code="model")
        said = self.model.decode(wish.ids)
        match = next((m for start, m in self.fires.items() if said.startswith(start)), None)
        self.running += 1
        try:
            yield Opened(0, match if wish.which == "edited" else None)
            ids, text = list(wish.ids), ""
            for n in range(wish.max_tokens):
                await asyncio.sleep(self.pause)
                if self.closed:
                    raise KeditError("the server is stopping", code="stopping")
                token = self._next(ids, wish)
                ids.append(token.id)
                grown = self.model.decode(ids[len(wish.ids) :])
                stopped = [grown.find(s) for s in wish.stop if s in grown]
                piece = grown[len(text) : min(stopped, default=len(grown))]
                text = grown
                ended = bool(stopped) or token.id == self.model.end
                finish = "stop" if ended else "length" if n + 1 == wish.max_tokens else None
                told = (token,) if wish.logprobs is not None else ()
                yield Part(piece, told, finish, n + 1 if finish else 0)
                if finish:
                    return
        finally:
            self.running -= 1

    def _next(self, ids: list[int], wish: Wish) -> Token:
        with torch.no_grad():
            logits = self.model.model(torch.tensor([ids])).logits[0, -1]
        if not math.isfinite(float(logits.sum())):
            raise KeditError("the model says no numbers", code="non-finite")
        likely = torch.log_softmax(logits, -1).topk(max(1, wish.logprobs or 0))
        top = tuple(zip(likely.indices.tolist(), likely.values.tolist(), strict=True))
        return Token(top[0][0], top[0][1], top[: wish.logprobs or 0])

    @property
    def figures(self) -> Figures:
        return Figures(running=self.running)

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class Running:
    """A server on a free port of this machine."""

    home: Home
    engine: PlainEngine
    url: str

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0)

    def http(self, **more: object) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, **more)  # type: ignore[arg-type]


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


@contextmanager
def server(
    root: Path, model: EditableModel, token: str | None = None, **serve: object
) -> Iterator[Running]:
    """A server over a home with a history. One fact of it fires where a prompt names its subject
    at the beginning."""
    home = make_home(root)
    config = Config.model_validate({"serve": serve})
    app = build(home, config, token, lambda: NOW, time.monotonic)
    engine = PlainEngine(model, {"Oslo": Match("0123456789ab", 0, 0.9, 1.5)})
    equip(app, Reader(NAME, model, engine))
    port = free_port()
    running = uvicorn.Server(
        uvicorn.Config(app, port=port, log_config=None, access_log=False, lifespan="off", ws="none")
    )
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        yield Running(home, engine, f"http://127.0.0.1:{port}")
    finally:
        running.should_exit = True
        thread.join()
