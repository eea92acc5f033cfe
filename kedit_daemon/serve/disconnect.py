"""Clients that disconnect before they are answered: their work is cancelled."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

CLIENT_GONE = 499  # nobody reads the status

Result = TypeVar("Result")


async def run_unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """Return the result of the work; None if the client disconnects first.

    Only after the body has been read.
    """
    tasks = asyncio.ensure_future(work), asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
