"""Which programs may come in, and how often. (The pages let people in themselves.)"""

import hmac
import math
from collections.abc import Callable
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from kedit_daemon.serve.errors import RequestError, error_response
from kedit_daemon.serve.hosts import parse_host_name, parse_origin_host

MAX_CLIENTS = 10_000  # that are remembered at most


class RateLimiter:
    """So many requests a minute of each client: what it does not use it saves, for a minute."""

    def __init__(self, per_minute: int, monotonic: Callable[[], float]) -> None:
        self.max_requests, self.monotonic = per_minute, monotonic
        self._request_cost = 60 / per_minute  # seconds
        self._clients: dict[str, tuple[float, float]] = {}  # seconds saved, and at what time

    def check_rate(self, client: str, *, take: bool = True) -> int:
        """Take one request, or only look; 0, or the seconds after which there will be one."""
        now = self.monotonic()
        saved, at = self._clients.pop(client, (60.0, now))
        saved = min(60.0, saved + now - at)
        allowed = saved >= self._request_cost
        # At the end: the longest silent come first.
        self._clients[client] = (saved - self._request_cost if allowed and take else saved, now)
        if len(self._clients) > MAX_CLIENTS:
            del self._clients[next(iter(self._clients))]
        return 0 if allowed else math.ceil(self._request_cost - saved)


class AccessGate:
    """Lets requests in to the endpoint within it.

    token: what a client must show; None where only this machine reaches the server. Then no other
    name than this machine's own may be asked for, or a page that a browser shows could have its
    own name lead here.
    """

    def __init__(self, app: ASGIApp, token: str | None, rate: RateLimiter | None) -> None:
        self.app, self.rate_limiter = app, rate
        self.token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        try:
            self._check_request(scope, Headers(scope=scope))
        except RequestError as refused:
            await error_response(refused)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check_request(self, scope: Scope, headers: Headers) -> None:
        if self.rate_limiter is not None:
            client = scope["client"][0] if scope["client"] else ""
            if seconds := self.rate_limiter.check_rate(client):
                raise RequestError(
                    f"more than {self.rate_limiter.max_requests} requests in a minute",
                    status=429,
                    code="rate_limit_exceeded",
                    retry=seconds,
                )
        if self.token is None:
            if not _is_loopback_name(headers.get("host", "")):
                raise _forbidden_error(
                    "without a token only this machine's own name is answered to"
                )
        elif not hmac.compare_digest(_read_bearer_token(headers), self.token):
            raise RequestError("no token, or a wrong one", status=401, code="invalid_api_key")
        origin = headers.get("origin")
        ours = not origin or parse_origin_host(origin) == (headers.get("host") or None)
        if scope["method"] != "GET" and not ours:
            raise _forbidden_error("a page of another server may not change anything here")


def _read_bearer_token(headers: Headers) -> bytes:
    """The token that a request shows; nothing where it shows none."""
    scheme, _, said = headers.get("authorization", "").strip().partition(" ")
    return said.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _is_loopback_name(host: str) -> bool:
    name = parse_host_name(host)
    try:
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


def _forbidden_error(why: str) -> RequestError:
    return RequestError(why, status=403, code="forbidden")
