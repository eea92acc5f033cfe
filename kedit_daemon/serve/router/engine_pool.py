"""The engines behind a router: one that answers is chosen for each request, and one that does not
is left alone for a while."""

import asyncio
import hashlib
import logging
from collections.abc import Callable, Sequence
from http.cookiejar import CookieJar, DefaultCookiePolicy

import httpx
from pydantic_core import from_json

from kedit_daemon.serve.errors import RequestError, bad_request
from kedit_daemon.system.backoff import Backoff

CONNECT_SECONDS = 2.0
IDLE_SECONDS = 2.0  # that a connection is kept: engines close theirs after five
REST_SECONDS, MAX_REST_SECONDS = 1.0, 30.0  # of an engine that does not answer
RETRY_SECONDS = 1  # told to a client when no engine answers
UNAVAILABLE = (502, 503, 504)  # of an engine that starts, or of a proxy before one that is gone
Headers = Sequence[tuple[bytes, bytes]]
log = logging.getLogger(__name__)


class EnginePool:
    """Engines that serve the same model, by their addresses."""

    def __init__(self, urls: Sequence[str], monotonic: Callable[[], float]) -> None:
        self.urls = tuple(urls)
        self._rests = {url: Backoff(REST_SECONDS, MAX_REST_SECONDS, monotonic) for url in urls}
        self._client = httpx.AsyncClient(
            # No limit of time: an answer may take as long as it takes.
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx.Limits(keepalive_expiry=IDLE_SECONDS),
            # One client's cookies are no other's.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            trust_env=False,  # no proxy of the environment
        )

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def send(
        self, method: str, path: str, headers: Headers, body: bytes, conversation: str
    ) -> httpx.Response:
        """Send a request; return the response, its body still unread, to be closed by the caller.

        A conversation goes to the same engine each time, for what it has cached of it, as long as
        that one answers. Engines that cannot be reached, or are starting, are passed over. What one
        has taken and not begun to answer is sent once more, and not oftener: it may be the request
        that does it. Raises RequestError (503): none answers.
        """
        sent_before = False
        for url in self._order_engines(conversation):
            request = self._client.build_request(method, url + path, headers=headers, content=body)
            try:
                response = await self._client.send(request, stream=True)
            except httpx.LocalProtocolError as error:
                raise bad_request(f"the request cannot be passed on: {error}") from error
            except httpx.HTTPError as error:
                self._note_failure(url, error)
                if not isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                    if sent_before:
                        break
                    sent_before = True
                continue
            if response.status_code in UNAVAILABLE:
                self._note_failure(url, f"it answers {response.status_code}")
                await response.aclose()
                continue
            self._rests[url].reset()
            return response
        raise RequestError(
            "no engine answers", status=503, code="engine_unreachable", retry=RETRY_SECONDS
        )

    async def list_models(self, headers: Headers) -> dict[str, str]:
        """Return what an engine has loaded, a folder or a hub's name, by the model's name, without
        adapters. Raises RequestError (503): none answers."""
        response = await self.send("GET", "/v1/models", headers, b"", "")
        try:
            listed = from_json(await response.aread())["data"] if response.is_success else []
            models = [model for model in listed if not model.get("parent")]
            return {str(m["id"]): str(m.get("root") or m["id"]) for m in models}
        except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("An engine does not say which models it has: %r", error)
            return {}
        finally:
            await response.aclose()

    async def find_silent(self) -> list[str]:
        """Ask each engine for its models; return what is wrong with those that do not answer."""
        return [why for why in await asyncio.gather(*map(self._ask_engine, self.urls)) if why]

    async def _ask_engine(self, url: str) -> str:
        """Return what is wrong with an engine; an empty text if it answers."""
        try:
            response = await self._client.get(f"{url}/v1/models", timeout=CONNECT_SECONDS)
        except httpx.HTTPError as error:
            return f"{url}: {self._note_failure(url, error)}"
        if response.is_server_error:
            return f"{url}: {self._note_failure(url, f'it answers {response.status_code}')}"
        self._rests[url].reset()
        return ""

    def _order_engines(self, conversation: str) -> list[str]:
        """Return the engines in the order in which a conversation asks them, those at rest last; a
        single one twice: its connection may have been closed just now."""

        def rank(url: str) -> tuple[bool, bytes]:
            drawn = hashlib.sha256(f"{url}\n{conversation}".encode()).digest()
            return not self._rests[url].is_due(), drawn

        return sorted(self.urls * 2 if len(self.urls) == 1 else self.urls, key=rank)

    def _note_failure(self, url: str, error: httpx.HTTPError | str) -> str:
        """Leave an engine alone for a while; return the reason as text."""
        reason = str(error) or type(error).__name__
        if self._rests[url].is_due():  # not again by each of many requests
            wait = self._rests[url].record_failure()
            log.warning("The engine %s: %s; it is left alone for %g s", url, reason, wait)
        return reason
