"""Access of programs: token, host, origin and rate limit. (The dashboard has its own sign-in.)"""

import hmac
import math
from collections.abc import Callable, Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from kedit_daemon.serve.errors import RequestError, error_response
from kedit_daemon.serve.hosts import is_safe_host, is_same_origin

MAX_CLIENTS = 10_000  # whose requests are remembered


class RateLimiter:
    """A number of requests a minute for each client; unused ones are saved for a minute."""

    def __init__(self, per_minute: int, monotonic: Callable[[], float]) -> None:
        self.max_requests, self.monotonic = per_minute, monotonic
        self._request_cost = 60 / per_minute  # seconds
        self._clients: dict[str, tuple[float, float]] = {}  # (seconds saved, timestamp)

    def check_rate(self, client: str, *, take: bool = True) -> int:
        """Return 0 if a request is allowed, else the seconds until one is; `take` counts it."""
        now = self.monotonic()
        saved, last_seen = self._clients.pop(client, (60.0, now))
        saved = min(60.0, saved + now - last_seen)
        allowed = saved >= self._request_cost
        # Inserted at the end: the clients that were silent for longest come first.
        self._clients[client] = (saved - self._request_cost if allowed and take else saved, now)
        if len(self._clients) > MAX_CLIENTS:
            del self._clients[next(iter(self._clients))]
        return 0 if allowed else math.ceil(self._request_cost - saved)


class AccessGate:
    """Lets requests in to an endpoint.

    token: the bearer token of clients; None where only this machine reaches the server. Then it
    answers only to this machine's own names, or a page in a browser could point its own name here.
    origins: of pages elsewhere that may change something.
    """

    def __init__(
        self,
        app: ASGIApp,
        token: str | None,
        rate: RateLimiter | None,
        origins: Collection[str] = (),
    ) -> None:
        self.app, self.rate_limiter, self.origins = app, rate, origins
        self.token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand a request on, or answer it with the reason why not."""
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
                message = f"more than {self.rate_limiter.max_requests} requests in a minute"
                code = "rate_limit_exceeded"
                raise RequestError(message, status=429, code=code, retry=seconds)
        if self.token is None:
            if not is_safe_host(headers.get("host", ""), loopback_only=True):
                raise _forbidden_error("without a token the server answers only to localhost")
        elif not hmac.compare_digest(_read_bearer_token(headers), self.token):
            raise RequestError("no token, or a wrong one", status=401, code="invalid_api_key")
        # Programs send no Origin.
        origin = headers.get("origin")
        is_foreign = origin and not is_same_origin(headers) and origin not in self.origins
        if scope["method"] != "GET" and is_foreign:
            message = "a page of another server may not change anything here"
            raise _forbidden_error(f"{message}: [serve] allowed_origins names those that may")


def _read_bearer_token(headers: Headers) -> bytes:
    """Return the bearer token of a request, or nothing."""
    scheme, _, token = headers.get("authorization", "").strip().partition(" ")
    return token.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _forbidden_error(message: str) -> RequestError:
    return RequestError(message, status=403, code="forbidden")
