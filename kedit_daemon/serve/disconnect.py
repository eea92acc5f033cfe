"""Clients that leave before they are answered: nothing goes on for them."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

CLIENT_GONE = 499  # nobody reads the status

Result = TypeVar("Result")


async def run_unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The work's result; None when the client left before it was done. Call it once the body is
    read."""
    doing, leaving = (
        asyncio.ensure_future(work),
        asyncio.ensure_future(_wait_for_disconnect(request)),
    )
    try:
        await asyncio.wait({doing, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return doing.result() if doing.done() else None
    finally:
        doing.cancel()
        leaving.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
