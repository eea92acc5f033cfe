"""The answers to all wishes of one request, side by side."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import Any

from kedit_daemon.serve.errors import Refused
from kedit_daemon.serve.inference.reader import Engine
from kedit_daemon.serve.inference.types import Opened, Part, Wish

TRIES = 3


class Rows:
    """One wish a row. Close it, whatever happens: what still runs then ends."""

    def __init__(self, engine: Engine, wishes: Sequence[Wish]) -> None:
        self._engine, self._wishes = engine, wishes
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> list[Opened]:
        """Wait until all rows have begun, in one generation; raises what any of them raises."""
        for _ in range(TRIES):
            self._start()
            opened = await self._opened()
            if len({one.generation for one in opened}) == 1:
                return opened
            self.close()  # a new generation came in between: nobody has read anything yet
        raise Refused("the generation changes all the time", status=503, code="overloaded", retry=1)

    async def parts(self) -> AsyncIterator[tuple[int, Part]]:
        """Row and part as they come, until every row has its last; call it after `open`."""
        left = len(self._wishes)
        while left:
            row, part = self._early.popleft() if self._early else await self._next()
            left -= part.finish is not None
            yield row, part

    def close(self) -> None:
        """End what still runs."""
        for task in self._tasks:
            task.cancel()

    def _start(self) -> None:
        # Read by the engine's pace, whatever the client's is: a row must not keep its place.
        self._queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        self._early: deque[tuple[int, Part]] = deque()
        self._tasks = []
        for row, wish in enumerate(self._wishes):
            task = asyncio.create_task(self._pump(self._queue, row, wish))
            task.add_done_callback(self._ended)
            self._tasks.append(task)

    async def _pump(self, queue: asyncio.Queue[tuple[int, Any]], row: int, wish: Wish) -> None:
        async for item in self._engine.answer(wish):
            queue.put_nowait((row, item))

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task in self._tasks and not task.cancelled() and (error := task.exception()):
            self._queue.put_nowait((self._tasks.index(task), error))

    async def _opened(self) -> list[Opened]:
        opened: dict[int, Opened] = {}
        while len(opened) < len(self._wishes):
            row, item = await self._next()
            if isinstance(item, Opened):
                opened[row] = item
            else:
                self._early.append((row, item))
        return [opened[row] for row in range(len(self._wishes))]

    async def _next(self) -> tuple[int, Any]:
        row, item = await self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return row, item
