"""The answers to all choices of one request, generated in parallel."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

from kedit_daemon.serve.errors import RequestError
from kedit_daemon.serve.inference.types import AnswerPart, AnswerStart, GenerationRequest

MAX_TRIES = 3


class AnswerFanout:
    """A row per generation request. Close it in any case: that ends the rows that still run."""

    def __init__(
        self,
        stream_answer: Callable[[GenerationRequest], AsyncGenerator[AnswerStart | AnswerPart]],
        requests: Sequence[GenerationRequest],
    ) -> None:
        self._stream_answer, self._requests = stream_answer, requests
        self._tasks: list[asyncio.Task[None]] = []

    async def start_answers(self) -> list[AnswerStart]:
        """Wait until all rows have begun, in one generation; raise what any of them raises."""
        for _ in range(MAX_TRIES):
            self._start_tasks()
            starts = await self._collect_starts()
            if len({start.generation for start in starts}) == 1:
                return starts
            self.close()  # a new generation came in between: nobody has read anything yet
        message = "the generation changes all the time"
        raise RequestError(message, status=503, code="overloaded", retry=1)

    async def stream_parts(self) -> AsyncIterator[tuple[int, AnswerPart]]:
        """Yield (row, part) as parts arrive, until every row has its last; needs
        `start_answers`."""
        unfinished = len(self._requests)
        while unfinished:
            early = self._early_parts
            row, part = early.popleft() if early else await self._next_item()
            unfinished -= part.finish_reason is not None
            yield row, part

    def close(self) -> None:
        """Cancel the rows that still run."""
        for task in self._tasks:
            task.cancel()

    def _start_tasks(self) -> None:
        # Read at the engine's pace, whatever the client's is: a row must not keep its place.
        self._queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._early_parts: deque[tuple[int, AnswerPart]] = deque()
        self._tasks = []
        for row, request in enumerate(self._requests):
            task = asyncio.create_task(self._pump_answer(self._queue, row, request))
            task.add_done_callback(self._forward_error)
            self._tasks.append(task)

    async def _pump_answer(
        self, queue: asyncio.Queue[tuple[int, Any]], row: int, request: GenerationRequest
    ) -> None:
        async for item in self._stream_answer(request):
            queue.put_nowait((row, item))

    def _forward_error(self, task: asyncio.Task[None]) -> None:
        if task in self._tasks and not task.cancelled() and (error := task.exception()):
            self._queue.put_nowait((self._tasks.index(task), error))

    async def _collect_starts(self) -> list[AnswerStart]:
        starts: dict[int, AnswerStart] = {}
        while len(starts) < len(self._requests):
            row, item = await self._next_item()
            if isinstance(item, AnswerStart):
                starts[row] = item
            else:
                self._early_parts.append((row, item))
        return [starts[row] for row in range(len(self._requests))]

    async def _next_item(self) -> tuple[int, Any]:
        row, item = await self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return row, item
