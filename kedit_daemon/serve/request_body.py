"""The body of a request, up to a limit."""

from starlette.requests import Request

from kedit_daemon.serve.errors import RequestError


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Read the body; raise RequestError (413) as soon as it is known to be too long."""
    length = request.headers.get("content-length", "")
    too_large = RequestError(
        f"the body may have {max_bytes} bytes at most", status=413, code="too_large"
    )
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)
