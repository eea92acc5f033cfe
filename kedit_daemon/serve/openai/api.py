"""OpenAI's API: /v1/models, /v1/completions and /v1/chat/completions."""

import secrets
from collections.abc import AsyncIterator, Callable
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
from kedit_daemon.serve.openai.fanout import AnswerFanout
from kedit_daemon.serve.openai.request_parser import (
    BASE_SUFFIX,
    GENERATION_SUFFIX,
    ParsedRequest,
    RequestParser,
    parse_chat,
    parse_completion,
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


def get_reader(request: Request) -> Reader:
    """Return the server's model; raise RequestError while it is being loaded."""
    reader: Reader | None = request.app.state.reader
    if reader is None:
        raise RequestError("the model is being loaded", status=503, code="loading", retry=5)
    return reader


class OpenAIApi:
    """The endpoints. Prompts and answers are neither kept nor logged."""

    def __init__(
        self, home: Home, config: ServeConfig, clock: Callable[[], datetime], meters: ServerMetrics
    ) -> None:
        self.home, self.config, self.clock, self.metrics = home, config, clock, meters

    def build_routes(self, gate: Middleware) -> list[Route]:
        """Return the routes of the endpoints, behind a gate."""
        return [
            Route("/v1/models", self.list_models, middleware=[gate]),
            Route("/v1/models/{name:path}", self.get_model, middleware=[gate]),
            Route("/v1/completions", self.create_completion, methods=["POST"], middleware=[gate]),
            Route("/v1/chat/completions", self.create_chat, methods=["POST"], middleware=[gate]),
        ]

    async def list_models(self, request: Request) -> Response:
        """List the model as edited, unedited, and by generation."""
        models = await run_in_threadpool(self._query_models, get_reader(request).name)
        return JSONResponse({"object": "list", "data": models})

    async def get_model(self, request: Request) -> Response:
        """Return one model of the list."""
        name = request.path_params["name"]
        for model in await run_in_threadpool(self._query_models, get_reader(request).name):
            if model["id"] == name:
                return JSONResponse(model)
        raise KeditError(f"there is no model {name!r} here", code="model")

    async def create_completion(self, request: Request) -> Response:
        """Continue a text."""
        return await self._answer_request(request, parse_completion)

    async def create_chat(self, request: Request) -> Response:
        """Continue a conversation."""
        return await self._answer_request(request, parse_chat)

    def _query_models(self, name: str) -> list[dict[str, Any]]:
        with closing(open_readonly(self.home.database_file)) as conn:
            rows = conn.execute("SELECT id, created_at FROM generations ORDER BY id").fetchall()
        created = {int(row["id"]): datetime.fromisoformat(row["created_at"]) for row in rows}
        names = {name: max(created.values()), name + BASE_SUFFIX: created[0]}
        names |= {f"{name}{GENERATION_SUFFIX}{n}": time for n, time in created.items()}
        return [
            {"id": n, "object": "model", "created": int(time.timestamp()), "owned_by": MODEL_OWNER}
            for n, time in names.items()
        ]

    async def _answer_request(self, request: Request, parse: RequestParser) -> Response:
        reader = get_reader(request)
        body = await read_body(request, self.config.max_body_bytes)
        # However many rows run together, all of a request wait in the queue first.
        parsed = await run_in_threadpool(parse, body, reader, self.config.waiting_limit)
        fanout = AnswerFanout(reader.engine.stream_answer, parsed.generation_requests)
        streaming = False
        try:
            starts = await run_unless_gone(request, fanout.start_answers())
            if starts is None:
                return Response(status_code=CLIENT_GONE)
            self.metrics.token_counter.labels("prompt").inc(parsed.prompt_tokens)
            builder = ResponseBuilder(
                id=("chatcmpl-" if parsed.is_chat else "cmpl-") + secrets.token_hex(12),
                created=int(self.clock().timestamp()),
                model=parsed.model,
                is_chat=parsed.is_chat,
                answer_starts=starts,
                has_logprobs=parsed.generation_requests[0].logprobs is not None,
                token_text=reader.token_text,
                echoes=parsed.echoes,
            )
            if parsed.is_streaming:
                streaming = True
                events = self._stream_events(parsed, fanout, builder)
                return _EventStream(fanout, events, builder.build_headers())
            work = self._collect_response(parsed, fanout, builder)
            return await run_unless_gone(request, work) or Response(status_code=CLIENT_GONE)
        finally:
            if not streaming:
                fanout.close()

    async def _collect_response(
        self, parsed: ParsedRequest, fanout: AnswerFanout, builder: ResponseBuilder
    ) -> Response:
        choices = [Choice() for _ in parsed.generation_requests]
        async for row, part in fanout.stream_parts():
            choices[row].add_part(part)
        usage = self._count_usage(parsed, sum(choice.token_count for choice in choices))
        # In a thread: with the log probabilities of many tokens it takes a while.
        return await run_in_threadpool(
            lambda: JSONResponse(
                builder.build_response(choices, usage), headers=builder.build_headers(choices)
            )
        )

    async def _stream_events(
        self, parsed: ParsedRequest, fanout: AnswerFanout, builder: ResponseBuilder
    ) -> AsyncIterator[bytes]:
        first = True
        try:
            async for chunk in self._stream_chunks(parsed, fanout, builder):
                if parsed.needs_usage and "usage" not in chunk:
                    chunk["usage"] = None
                yield encode_event(builder.mark_first_chunk(chunk) if first else chunk)
                first = False
        except KeditError as error:  # the status was sent long ago
            yield encode_event(error_body(error))
            return
        yield DONE_EVENT

    async def _stream_chunks(
        self, parsed: ParsedRequest, fanout: AnswerFanout, builder: ResponseBuilder
    ) -> AsyncIterator[dict[str, Any]]:
        for chunk in builder.build_opening():
            yield chunk
        rows = range(len(parsed.generation_requests))
        for row in rows if parsed.echoes else ():
            yield builder.build_echo_chunk(row)
        offsets = [builder.count_echo(row) for row in rows]
        produced = 0
        async for row, part in fanout.stream_parts():
            produced += part.token_count
            if part.text or part.tokens or part.finish_reason:
                yield builder.build_chunk(row, part, offsets[row])
            offsets[row] += builder.count_characters(part.tokens)
        usage = self._count_usage(parsed, produced)
        if parsed.needs_usage:
            yield builder.build_usage_chunk(usage)

    def _count_usage(self, parsed: ParsedRequest, produced: int) -> dict[str, int]:
        self.metrics.token_counter.labels("completion").inc(produced)
        return build_usage(parsed.prompt_tokens, produced)


class _EventStream(StreamingResponse):
    """A stream of events that ends its rows with it, even if the client never began to read."""

    media_type = "text/event-stream"

    def __init__(
        self, fanout: AnswerFanout, events: AsyncIterator[bytes], headers: dict[str, str]
    ) -> None:
        # Proxies must not buffer the stream.
        unbuffered = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers | unbuffered)
        self._fanout = fanout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._fanout.close()
