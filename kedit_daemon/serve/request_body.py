"""The body of a request, never more of it than allowed."""

from starlette.requests import Request

from kedit_daemon.serve.errors import RequestError


async def read_body(request: Request, most: int) -> bytes:
    """All of it; raises Refused with 413 as soon as it is known to be too long."""
    said = request.headers.get("content-length", "")
    if said.isdecimal() and int(said) > most:
        raise _body_too_large(most)
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > most:
            raise _body_too_large(most)
        pieces.append(piece)
    return b"".join(pieces)


def _body_too_large(most: int) -> RequestError:
    return RequestError(f"the body may have {most} bytes", status=413, code="too_large")
