"""An engine that stands for vLLM behind a router, and a router in front of such engines.

Its answers tell which model was asked and what it was asked, so that a test sees what came through.
"""

import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn
from command_line import NOW
from serving import free_port
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from kedit_daemon.config import Config
from kedit_daemon.home import Home
from kedit_daemon.serve.app import build_app
from kedit_daemon.serve.router.open_facts import open_facts

BASE_MODEL = "stand-in"


@dataclass
class StandIn:
    """An engine's state, and what it was sent."""

    url: str = ""
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    pause: float = 0.0  # seconds before each word of a stream, and before an answer

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
        return JSONResponse({"object": "list", "data": [{"id": BASE_MODEL, "object": "model"}]})

    async def complete(self, request: Request) -> Response:
        return await self._answer(request, "text_completion")

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, "chat.completion")

    async def _answer(self, request: Request, kind: str) -> Response:
        body = await request.body()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        try:
            fields = json.loads(body)
        except ValueError as error:
            return JSONResponse({"error": {"message": f"no JSON: {error}"}}, 400)
        if fields.get("model") != BASE_MODEL:
            message = f"The model {fields.get('model')!r} does not exist."
            return JSONResponse({"error": {"message": message, "code": 404}}, 404)
        is_chat = kind == "chat.completion"
        asked = fields["messages"][-1]["content"] if is_chat else fields["prompt"]
        prompts = asked if isinstance(asked, list) and not is_chat else [asked]
        if fields.get("stream"):
            words = self._stream_words(fields, is_chat, str(prompts[0]))
            return StreamingResponse(words, media_type="text/event-stream")
        time.sleep(self.pause)
        said = [f"asked: {prompt}" for prompt in prompts for _ in range(fields.get("n", 1))]
        texts = [
            {"message": {"role": "assistant", "content": s}} if is_chat else {"text": s}
            for s in said
        ]
        choices = [{"index": n, **text, "finish_reason": "stop"} for n, text in enumerate(texts)]
        return JSONResponse({"id": "x", "object": kind, "model": BASE_MODEL, "choices": choices})

    async def _stream_words(self, fields: Any, is_chat: bool, asked: str) -> AsyncIterator[bytes]:
        for word in asked.split():
            time.sleep(self.pause)
            text = {"delta": {"content": word}} if is_chat else {"text": word}
            event = {"id": "x", "model": fields["model"], "choices": [{"index": 0, **text}]}
            yield f"data: {json.dumps(event)}\n\n".encode()
        yield b"data: [DONE]\n\n"


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
def stand_in() -> Iterator[StandIn]:
    """An engine that listens within the block."""
    engine = StandIn()
    with _listening(engine.build_app()) as engine.url:
        yield engine


@contextmanager
def router(
    home: Home, engines: list[str], token: str | None = None, **more: Any
) -> Iterator[httpx.Client]:
    """A client of a router over a home, in front of engines."""
    config = Config.model_validate({"serve": {"engine": engines}, **more})
    app = build_app(home, config, token, lambda: NOW, time.monotonic)
    app.state.router.facts = open_facts(home, config)
    with _listening(app) as url, httpx.Client(base_url=url, timeout=30) as client:
        yield client
