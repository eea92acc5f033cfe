"""Lines of an engine's stream of events, as they come: not even their ends are changed."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

from pydantic_core import from_json

PREFIX, DONE = b"data:", b"[DONE]"


async def split_lines(pieces: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
    """Yield lines with their ends, and what stands behind the last end. Nothing but a line feed
    ends one: JSON may hold the other characters that end lines."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line + b"\n"
    if rest:
        yield rest


def read_event(line: bytes) -> dict[str, Any] | None:
    """Read the event in a line; None if there is none. Raises ValueError: it is not JSON."""
    content = line.removeprefix(PREFIX).strip()
    if not line.startswith(PREFIX) or content == DONE:
        return None
    event = from_json(content)
    return event if isinstance(event, dict) else None
