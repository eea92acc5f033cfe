"""Which programs may come in, and how often. (The pages let people in themselves.)"""

import hmac
import math
from collections.abc import Callable
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from kedit_daemon.serve.errors import Refused, refusal
from kedit_daemon.serve.hosts import host_name, place

CLIENTS = 10_000  # that are remembered at most


class Rate:
    """So many requests a minute of each client: what it does not use it saves, for a minute."""

    def __init__(self, per_minute: int, monotonic: Callable[[], float]) -> None:
        self.most, self.monotonic = per_minute, monotonic
        self._cost = 60 / per_minute  # seconds
        self._clients: dict[str, tuple[float, float]] = {}  # seconds saved, and at what time

    def wait(self, client: str, *, take: bool = True) -> int:
        """Take one request, or only look; 0, or the seconds after which there will be one."""
        now = self.monotonic()
        saved, at = self._clients.pop(client, (60.0, now))
        saved = min(60.0, saved + now - at)
        allowed = saved >= self._cost
        # At the end: the longest silent come first.
        self._clients[client] = (saved - self._cost if allowed and take else saved, now)
        if len(self._clients) > CLIENTS:
            del self._clients[next(iter(self._clients))]
        return 0 if allowed else math.ceil(self._cost - saved)


class Gate:
    """Lets requests in to the endpoint within it.

    token: what a client must show; None where only this machine reaches the server. Then no other
    name than this machine's own may be asked for, or a page that a browser shows could have its
    own name lead here.
    """

    def __init__(self, app: ASGIApp, token: str | None, rate: Rate | None) -> None:
        self.app, self.rate = app, rate
        self.token = None if token is None else token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        try:
            self._check(scope, Headers(scope=scope))
        except Refused as refused:
            await refusal(refused)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        if self.rate is not None:
            client = scope["client"][0] if scope["client"] else ""
            if seconds := self.rate.wait(client):
                raise Refused(
                    f"more than {self.rate.most} requests in a minute",
                    status=429,
                    code="rate_limit_exceeded",
                    retry=seconds,
                )
        if self.token is None:
            if not _own_name(headers.get("host", "")):
                raise _forbidden("without a token only this machine's own name is answered to")
        elif not hmac.compare_digest(_shown(headers), self.token):
            raise Refused("no token, or a wrong one", status=401, code="invalid_api_key")
        origin = headers.get("origin")
        ours = not origin or place(origin) == (headers.get("host") or None)
        if scope["method"] != "GET" and not ours:
            raise _forbidden("a page of another server may not change anything here")


def _shown(headers: Headers) -> bytes:
    """The token that a request shows; nothing where it shows none."""
    scheme, _, said = headers.get("authorization", "").strip().partition(" ")
    return said.strip().encode("latin-1") if scheme.lower() == "bearer" else b""


def _own_name(host: str) -> bool:
    name = host_name(host)
    try:
        return name == "localhost" or ip_address(name).is_loopback
    except ValueError:
        return False


def _forbidden(why: str) -> Refused:
    return Refused(why, status=403, code="forbidden")
