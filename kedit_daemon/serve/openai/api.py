"""OpenAI's API: /v1/models, /v1/completions and /v1/chat/completions."""

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from datetime import datetime
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from kedit_daemon.config import ServeConfig
from kedit_daemon.home import Home
from kedit_daemon.serve.disconnect import GONE, unless_gone
from kedit_daemon.serve.errors import Refused, error_body
from kedit_daemon.serve.inference.reader import Reader
from kedit_daemon.serve.metrics import Meters
from kedit_daemon.serve.openai import request_parser
from kedit_daemon.serve.openai.fanout import Rows
from kedit_daemon.serve.openai.request_parser import AT_BASE, AT_GENERATION, Asked, Read
from kedit_daemon.serve.openai.responses import DONE, Said, Shape, event, usage
from kedit_daemon.serve.request_body import whole_body
from memory.db.queries import open_readonly
from memory.errors import KeditError

OWNER = "kedit-daemon"

Endpoint = Callable[[Request], Awaitable[Response]]


def reader_of(request: Request) -> Reader:
    """The model of the server; raises Refused while it is being loaded."""
    reader: Reader | None = request.app.state.reader
    if reader is None:
        raise Refused("the model is being loaded", status=503, code="loading", retry=5)
    return reader


class Api:
    """The endpoints; nothing of what is asked or said is kept or logged."""

    def __init__(
        self, home: Home, config: ServeConfig, clock: Callable[[], datetime], meters: Meters
    ) -> None:
        self.home, self.config, self.clock, self.meters = home, config, clock, meters

    def routes(self, gate: Middleware) -> list[Route]:
        """Where the endpoints are, behind a gate."""
        at: list[tuple[str, Endpoint, str]] = [
            ("/v1/models", self.models, "GET"),
            ("/v1/models/{name:path}", self.model, "GET"),
            ("/v1/completions", self.completions, "POST"),
            ("/v1/chat/completions", self.chat, "POST"),
        ]
        return [Route(path, do, methods=[how], middleware=[gate]) for path, do, how in at]

    async def models(self, request: Request) -> Response:
        """What may be asked: the model as it is kept current, unedited, and by generation."""
        found = await run_in_threadpool(self._models, reader_of(request).name)
        return JSONResponse({"object": "list", "data": found})

    async def model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        for found in await run_in_threadpool(self._models, reader_of(request).name):
            if found["id"] == name:
                return JSONResponse(found)
        raise KeditError(f"there is no model {name!r} here", code="model")

    async def completions(self, request: Request) -> Response:
        """Text is continued."""
        return await self._answered(request, request_parser.completion)

    async def chat(self, request: Request) -> Response:
        """A conversation goes on."""
        return await self._answered(request, request_parser.chat)

    def _models(self, name: str) -> list[dict[str, Any]]:
        with closing(open_readonly(self.home.database)) as conn:
            rows = conn.execute("SELECT id, created_at FROM generations ORDER BY id").fetchall()
        made = {int(row["id"]): datetime.fromisoformat(row["created_at"]) for row in rows}
        names = {name: max(made.values()), name + AT_BASE: made[0]}
        names |= {f"{name}{AT_GENERATION}{n}": at for n, at in made.items()}
        return [
            {"id": n, "object": "model", "created": int(at.timestamp()), "owned_by": OWNER}
            for n, at in names.items()
        ]

    async def _answered(self, request: Request, read: Read) -> Response:
        reader = reader_of(request)
        body = await whole_body(request, self.config.max_body_bytes)
        # All wait for a moment, however many may run.
        wanted = await run_in_threadpool(read, body, reader, self.config.waiting_limit)
        rows = Rows(reader.engine, wanted.wishes)
        streaming = False
        try:
            opened = await unless_gone(request, rows.open())
            if opened is None:
                return Response(status_code=GONE)
            self.meters.tokens.labels("prompt").inc(wanted.prompt_tokens)
            shape = Shape(
                id=("chatcmpl-" if wanted.chat else "cmpl-") + secrets.token_hex(12),
                created=int(self.clock().timestamp()),
                model=wanted.model,
                chat=wanted.chat,
                opened=opened,
                logprobs=wanted.wishes[0].logprobs is not None,
                token_text=reader.token_text,
            )
            if wanted.stream:
                streaming = True
                return _Stream(rows, self._events(wanted, rows, shape), shape.headers)
            answer = await unless_gone(request, self._collected(wanted, rows, shape))
            return answer or Response(status_code=GONE)
        finally:
            if not streaming:
                rows.close()

    async def _collected(self, wanted: Asked, rows: Rows, shape: Shape) -> Response:
        said = [Said() for _ in wanted.wishes]
        async for row, part in rows.parts():
            said[row].add(part)
        produced = sum(one.produced for one in said)
        self.meters.tokens.labels("completion").inc(produced)
        cost = usage(wanted.prompt_tokens, produced)
        # In a thread: with the likelihoods of many tokens it takes a while.
        return await run_in_threadpool(
            lambda: JSONResponse(shape.whole(said, cost), headers=shape.headers)
        )

    async def _events(self, wanted: Asked, rows: Rows, shape: Shape) -> AsyncIterator[bytes]:
        first = True
        try:
            async for chunk in self._chunks(wanted, rows, shape):
                if wanted.usage and "usage" not in chunk:
                    chunk["usage"] = None
                yield event(shape.first(chunk) if first else chunk)
                first = False
        except KeditError as error:  # the status is long sent
            yield event(error_body(error))
            return
        yield DONE

    async def _chunks(
        self, wanted: Asked, rows: Rows, shape: Shape
    ) -> AsyncIterator[dict[str, Any]]:
        for chunk in shape.opening():
            yield chunk
        offsets = [0] * len(wanted.wishes)
        produced = 0
        async for row, part in rows.parts():
            produced += part.produced
            if part.text or part.tokens or part.finish:
                yield shape.chunk(row, part, offsets[row])
            offsets[row] += shape.width(part.tokens)
        self.meters.tokens.labels("completion").inc(produced)
        if wanted.usage:
            yield shape.cost(usage(wanted.prompt_tokens, produced))


class _Stream(StreamingResponse):
    """Events for as long as the client listens; then the rows end, also when it never began to."""

    media_type = "text/event-stream"

    def __init__(self, rows: Rows, events: AsyncIterator[bytes], headers: dict[str, str]) -> None:
        # A proxy that collects a stream before it hands it on would make it useless.
        quick = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers | quick)
        self._rows = rows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._rows.close()
