"""The answers to all wishes of one request, side by side."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

from kedit_daemon.serve.errors import RequestError
from kedit_daemon.serve.inference.reader import AnswerEngine
from kedit_daemon.serve.inference.types import AnswerPart, AnswerStart, GenerationRequest

MAX_TRIES = 3


class AnswerFanout:
    """One wish a row. Close it, whatever happens: what still runs then ends."""

    def __init__(self, engine: AnswerEngine, wishes: Sequence[GenerationRequest]) -> None:
        self._engine, self._requests = engine, wishes
        self._tasks: list[asyncio.Task[None]] = []

    async def start_answers(self) -> list[AnswerStart]:
        """Wait until all rows have begun, in one generation; raises what any of them raises."""
        for _ in range(MAX_TRIES):
            self._start_tasks()
            opened = await self._collect_starts()
            if len({one.generation for one in opened}) == 1:
                return opened
            self.close()  # a new generation came in between: nobody has read anything yet
        raise RequestError(
            "the generation changes all the time", status=503, code="overloaded", retry=1
        )

    async def stream_parts(self) -> AsyncIterator[tuple[int, AnswerPart]]:
        """Row and part as they come, until every row has its last; call it after `open`."""
        left = len(self._requests)
        while left:
            row, part = (
                self._early_parts.popleft() if self._early_parts else await self._next_item()
            )
            left -= part.finish_reason is not None
            yield row, part

    def close(self) -> None:
        """End what still runs."""
        for task in self._tasks:
            task.cancel()

    def _start_tasks(self) -> None:
        # Read by the engine's pace, whatever the client's is: a row must not keep its place.
        self._queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._early_parts: deque[tuple[int, AnswerPart]] = deque()
        self._tasks = []
        for row, wish in enumerate(self._requests):
            task = asyncio.create_task(self._pump_answer(self._queue, row, wish))
            task.add_done_callback(self._forward_error)
            self._tasks.append(task)

    async def _pump_answer(
        self, queue: asyncio.Queue[tuple[int, Any]], row: int, wish: GenerationRequest
    ) -> None:
        async for item in self._engine.stream_answer(wish):
            queue.put_nowait((row, item))

    def _forward_error(self, task: asyncio.Task[None]) -> None:
        if task in self._tasks and not task.cancelled() and (error := task.exception()):
            self._queue.put_nowait((self._tasks.index(task), error))

    async def _collect_starts(self) -> list[AnswerStart]:
        opened: dict[int, AnswerStart] = {}
        while len(opened) < len(self._requests):
            row, item = await self._next_item()
            if isinstance(item, AnswerStart):
                opened[row] = item
            else:
                self._early_parts.append((row, item))
        return [opened[row] for row in range(len(self._requests))]

    async def _next_item(self) -> tuple[int, Any]:
        row, item = await self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return row, item
