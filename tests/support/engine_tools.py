"""An engine that stands for vLLM behind a router, and a router in front of such engines.

Its answers tell which model was asked and what it was asked, so that a test sees what came through.
"""

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from command_line import NOW
from editing_home import Clock
from serving import free_port
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from kedit_daemon.config import Config
from kedit_daemon.home import Home
from kedit_daemon.serve.app import build_app
from kedit_daemon.serve.router.load_router import load_router
from memory.db.store import Store
from memory.facts import Fact, FactState

BASE_MODEL, BASE_ROOT = "stand-in", "/models/stand-in"
MAX_RANK = 16  # vLLM's --max-lora-rank


@dataclass
class StandIn:
    """An engine's state, and what it was sent. It takes adapters by vLLM's rules: one a request, by
    its name, found in a folder when it is first asked for, made for this very model, and kept."""

    url: str = ""
    adapters: Path | None = None
    takes_adapters: bool = True
    loaded: dict[str, bytes] = field(default_factory=dict)  # adapters' weights, by name
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    says: dict[str, str] = field(default_factory=dict)  # by what the model's name begins with
    extra: dict[str, str] = field(default_factory=dict)  # headers of the list of models
    status: int = 200  # of all answers
    pause: float = 0.0  # seconds before each word of a stream
    broken_off: int = 0  # streams that are not at their end
    words_said: int = 0  # in streams
    is_ascii: bool = True  # of streams: other characters are escaped

    @property
    def last_body(self) -> Any:
        return json.loads(self.bodies[-1])

    def build_app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self.list_models),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
            ]
        )

    async def list_models(self, request: Request) -> Response:
        self.headers.append(dict(request.headers))
        data = [{"id": BASE_MODEL, "root": BASE_ROOT}]
        return JSONResponse({"object": "list", "data": data}, headers=self.extra)

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, "text_completion")

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, "chat.completion")

    async def _answer(self, request: Request, kind: str) -> Response:
        body = await request.body()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        if self.status != 200:
            return JSONResponse({"error": {"message": "it does not work"}}, self.status)
        try:
            fields = dict(json.loads(body))
        except (ValueError, TypeError) as error:
            return JSONResponse({"error": {"message": f"no JSON: {error}"}}, 400)
        if empty := [name for name, value in fields.items() if value is None]:
            return JSONResponse({"error": {"message": f"null is no value of {empty}"}}, 400)
        model = fields.get("model")
        if model != BASE_MODEL and not self._load_adapter(str(model)):
            message = f"The model {fields.get('model')!r} does not exist."
            return JSONResponse({"error": {"message": message, "code": 404}}, 404)
        is_chat = kind == "chat.completion"
        asked = fields["messages"][-1]["content"] if is_chat else fields["prompt"]
        prompts = asked if isinstance(asked, list) and not is_chat else [asked]
        told = self._find_said(str(model))
        if fields.get("stream"):
            words = self._stream_words(fields, is_chat, told or str(prompts[0]))
            return StreamingResponse(words, media_type="text/event-stream")
        said = [told or f"asked: {prompt}" for prompt in prompts for _ in range(fields.get("n", 1))]
        texts = [{"message": {"content": text}} if is_chat else {"text": text} for text in said]
        choices = [{"index": n, **text} for n, text in enumerate(texts)]
        usage = {"prompt_tokens": 10, "completion_tokens": 5}
        whole = {"id": "x", "object": kind, "model": model, "choices": choices, "usage": usage}
        return JSONResponse(whole, headers={"x-engine": BASE_MODEL})

    def _find_said(self, model: str) -> str:
        return next((text for name, text in self.says.items() if model.startswith(name)), "")

    def _load_adapter(self, name: str) -> bool:
        if self.adapters is None or not self.takes_adapters:
            return False
        settings = self.adapters / name / "adapter_config.json"
        if name not in self.loaded and settings.is_file():
            known = json.loads(settings.read_bytes())
            if known["base_model_name_or_path"] == BASE_ROOT and known["r"] <= MAX_RANK:
                weights = self.adapters / name / "adapter_model.safetensors"
                self.loaded[name] = weights.read_bytes()
        return name in self.loaded

    async def _stream_words(self, fields: Any, is_chat: bool, said: str) -> AsyncIterator[bytes]:
        self.broken_off += 1
        for word in re.findall(r"\s*\S+", said):
            await asyncio.sleep(self.pause)
            self.words_said += 1
            text = {"delta": {"content": word}} if is_chat else {"text": word}
            event = {"id": "x", "model": fields["model"], "choices": [{"index": 0, **text}]}
            yield f"data: {json.dumps(event, ensure_ascii=self.is_ascii)}\n\n".encode()
        yield b"data: [DONE]\n\n"
        self.broken_off -= 1


class ClosingEngine:
    """An engine that takes requests, and dies of each."""

    def __init__(self) -> None:
        self.taken = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._take_requests)
        self._thread.start()

    def _take_requests(self) -> None:
        while True:
            client, _ = self._socket.accept()
            with client:
                if not client.recv(65536):
                    return
                self.taken += 1

    def stop(self) -> None:
        socket.create_connection(self._socket.getsockname()).close()
        self._thread.join()
        self._socket.close()


class _Server(uvicorn.Server):
    """A server that closes its router in the end, as that of a daemon does."""

    async def shutdown(self, sockets: Any = None) -> None:
        await super().shutdown(sockets)
        if (made := getattr(self.config.app.state, "router", None)) is not None:
            await made.close()


@contextmanager
def _listening(app: Starlette) -> Iterator[str]:
    port = free_port()
    running = _Server(
        uvicorn.Config(app, port=port, log_config=None, access_log=False, lifespan="off", ws="none")
    )
    thread = threading.Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{port}"
    finally:
        running.should_exit = True
        thread.join()


@contextmanager
def stand_in(adapters: Path | None = None) -> Iterator[StandIn]:
    """An engine that listens within the block, and reads adapters from a folder."""
    engine = StandIn(adapters=adapters)
    with _listening(engine.build_app()) as engine.url:
        yield engine


@contextmanager
def router(
    home: Home, engines: list[str], token: str | None = None, publish: Any = None, **serve: Any
) -> Iterator[httpx.Client]:
    """A client of a router over a home, in front of engines."""
    config = Config.model_validate(
        {"serve": {"engine": engines, **serve}, "publish": publish or {}}
    )
    app = build_app(home, config, token, lambda: NOW, time.monotonic)
    load_router(app.state.router, home, config, NOW.timestamp())
    with _listening(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client


def make_store(home: Home, *facts: Fact) -> Store:
    """The store of a home in which facts are live, without shards."""
    home.create_folders()
    store = Store(home.database_file, Clock())
    with store.db.transaction():
        for fact in facts:
            store.receive_fact(fact, "test.jsonl", False)
            store.change_state(fact.id, FactState.LIVE_SIDE)
    return store
