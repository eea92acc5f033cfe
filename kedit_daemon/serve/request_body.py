"""The body of a request, never more of it than allowed."""

from starlette.requests import Request

from kedit_daemon.serve.errors import Refused


async def whole_body(request: Request, most: int) -> bytes:
    """All of it; raises Refused with 413 as soon as it is known to be too long."""
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said) > most:
        raise _too_long(most)
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > most:
            raise _too_long(most)
        pieces.append(piece)
    return b"".join(pieces)


def _too_long(most: int) -> Refused:
    return Refused(f"the body may have {most} bytes", status=413, code="too_large")
