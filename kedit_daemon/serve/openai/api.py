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
from kedit_daemon.serve.disconnect import CLIENT_GONE, run_unless_gone
from kedit_daemon.serve.errors import RequestError, error_body
from kedit_daemon.serve.inference.reader import Reader
from kedit_daemon.serve.metrics import ServerMetrics
from kedit_daemon.serve.openai import request_parser
from kedit_daemon.serve.openai.fanout import AnswerFanout
from kedit_daemon.serve.openai.request_parser import (
    BASE_SUFFIX,
    GENERATION_SUFFIX,
    ParsedRequest,
    RequestParser,
)
from kedit_daemon.serve.openai.responses import (
    DONE_EVENT,
    Choice,
    ResponseBuilder,
    build_usage,
    encode_event,
)
from kedit_daemon.serve.request_body import read_body
from memory.db.queries import open_readonly
from memory.errors import KeditError

MODEL_OWNER = "kedit-daemon"

Endpoint = Callable[[Request], Awaitable[Response]]


def get_reader(request: Request) -> Reader:
    """The model of the server; raises Refused while it is being loaded."""
    reader: Reader | None = request.app.state.reader
    if reader is None:
        raise RequestError("the model is being loaded", status=503, code="loading", retry=5)
    return reader


class OpenAIApi:
    """The endpoints; nothing of what is asked or said is kept or logged."""

    def __init__(
        self, home: Home, config: ServeConfig, clock: Callable[[], datetime], meters: ServerMetrics
    ) -> None:
        self.home, self.config, self.clock, self.metrics = home, config, clock, meters

    def build_routes(self, gate: Middleware) -> list[Route]:
        """Where the endpoints are, behind a gate."""
        at: list[tuple[str, Endpoint, str]] = [
            ("/v1/models", self.list_models, "GET"),
            ("/v1/models/{name:path}", self.get_model, "GET"),
            ("/v1/completions", self.create_completion, "POST"),
            ("/v1/chat/completions", self.create_chat, "POST"),
        ]
        return [Route(path, do, methods=[how], middleware=[gate]) for path, do, how in at]

    async def list_models(self, request: Request) -> Response:
        """What may be asked: the model as it is kept current, unedited, and by generation."""
        found = await run_in_threadpool(self._query_models, get_reader(request).name)
        return JSONResponse({"object": "list", "data": found})

    async def get_model(self, request: Request) -> Response:
        """One of them."""
        name = request.path_params["name"]
        for found in await run_in_threadpool(self._query_models, get_reader(request).name):
            if found["id"] == name:
                return JSONResponse(found)
        raise KeditError(f"there is no model {name!r} here", code="model")

    async def create_completion(self, request: Request) -> Response:
        """Text is continued."""
        return await self._answer_request(request, request_parser.parse_completion)

    async def create_chat(self, request: Request) -> Response:
        """A conversation goes on."""
        return await self._answer_request(request, request_parser.parse_chat)

    def _query_models(self, name: str) -> list[dict[str, Any]]:
        with closing(open_readonly(self.home.database_file)) as conn:
            rows = conn.execute("SELECT id, created_at FROM generations ORDER BY id").fetchall()
        made = {int(row["id"]): datetime.fromisoformat(row["created_at"]) for row in rows}
        names = {name: max(made.values()), name + BASE_SUFFIX: made[0]}
        names |= {f"{name}{GENERATION_SUFFIX}{n}": at for n, at in made.items()}
        return [
            {"id": n, "object": "model", "created": int(at.timestamp()), "owned_by": MODEL_OWNER}
            for n, at in names.items()
        ]

    async def _answer_request(self, request: Request, read: RequestParser) -> Response:
        reader = get_reader(request)
        body = await read_body(request, self.config.max_body_bytes)
        # All wait for a moment, however many may run.
        wanted = await run_in_threadpool(read, body, reader, self.config.waiting_limit)
        rows = AnswerFanout(reader.engine, wanted.generation_requests)
        streaming = False
        try:
            opened = await run_unless_gone(request, rows.start_answers())
            if opened is None:
                return Response(status_code=CLIENT_GONE)
            self.metrics.token_counter.labels("prompt").inc(wanted.prompt_tokens)
            shape = ResponseBuilder(
                id=("chatcmpl-" if wanted.is_chat else "cmpl-") + secrets.token_hex(12),
                created=int(self.clock().timestamp()),
                model=wanted.model,
                is_chat=wanted.is_chat,
                answer_starts=opened,
                has_logprobs=wanted.generation_requests[0].logprobs is not None,
                token_text=reader.token_text,
            )
            if wanted.is_streaming:
                streaming = True
                return _EventStream(rows, self._stream_events(wanted, rows, shape), shape.headers)
            answer = await run_unless_gone(request, self._collect_response(wanted, rows, shape))
            return answer or Response(status_code=CLIENT_GONE)
        finally:
            if not streaming:
                rows.close()

    async def _collect_response(
        self, wanted: ParsedRequest, rows: AnswerFanout, shape: ResponseBuilder
    ) -> Response:
        said = [Choice() for _ in wanted.generation_requests]
        async for row, part in rows.stream_parts():
            said[row].add_part(part)
        produced = sum(one.token_count for one in said)
        self.metrics.token_counter.labels("completion").inc(produced)
        cost = build_usage(wanted.prompt_tokens, produced)
        # In a thread: with the likelihoods of many tokens it takes a while.
        return await run_in_threadpool(
            lambda: JSONResponse(shape.build_response(said, cost), headers=shape.headers)
        )

    async def _stream_events(
        self, wanted: ParsedRequest, rows: AnswerFanout, shape: ResponseBuilder
    ) -> AsyncIterator[bytes]:
        first = True
        try:
            async for chunk in self._stream_chunks(wanted, rows, shape):
                if wanted.needs_usage and "usage" not in chunk:
                    chunk["usage"] = None
                yield encode_event(shape.mark_first_chunk(chunk) if first else chunk)
                first = False
        except KeditError as error:  # the status is long sent
            yield encode_event(error_body(error))
            return
        yield DONE_EVENT

    async def _stream_chunks(
        self, wanted: ParsedRequest, rows: AnswerFanout, shape: ResponseBuilder
    ) -> AsyncIterator[dict[str, Any]]:
        for chunk in shape.build_opening():
            yield chunk
        offsets = [0] * len(wanted.generation_requests)
        produced = 0
        async for row, part in rows.stream_parts():
            produced += part.token_count
            if part.text or part.tokens or part.finish_reason:
                yield shape.build_chunk(row, part, offsets[row])
            offsets[row] += shape.count_characters(part.tokens)
        self.metrics.token_counter.labels("completion").inc(produced)
        if wanted.needs_usage:
            yield shape.build_usage_chunk(build_usage(wanted.prompt_tokens, produced))


class _EventStream(StreamingResponse):
    """Events for as long as the client listens; then the rows end, also when it never began to."""

    media_type = "text/event-stream"

    def __init__(
        self, rows: AnswerFanout, events: AsyncIterator[bytes], headers: dict[str, str]
    ) -> None:
        # A proxy that collects a stream before it hands it on would make it useless.
        quick = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers | quick)
        self._fanout = rows

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._fanout.close()
