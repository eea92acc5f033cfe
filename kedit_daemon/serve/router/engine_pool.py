"""The engines behind a router: one that answers is chosen for each request, and one that does not
is left alone for a while."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence

import httpx
from pydantic_core import from_json

from kedit_daemon.serve.errors import RequestError
from kedit_daemon.system.backoff import Backoff

CONNECT_SECONDS = 2.0
REST_SECONDS, MAX_REST_SECONDS = 1.0, 30.0  # of an engine that does not answer
RETRY_SECONDS = 1  # told to a client when no engine answers
log = logging.getLogger(__name__)


class EnginePool:
    """Engines that serve the same model, by their addresses."""

    def __init__(self, urls: Sequence[str], monotonic: Callable[[], float]) -> None:
        self.urls = tuple(urls)
        self._rests = {url: Backoff(REST_SECONDS, MAX_REST_SECONDS, monotonic) for url in urls}
        # No proxy of the environment, and no limit of time: an answer may take as long as it takes.
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx.AsyncClient(trust_env=False, timeout=timeout, limits=limits)

    async def close(self) -> None:
        """Close all connections."""
        await self._client.aclose()

    async def send(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes, conversation: str
    ) -> httpx.Response:
        """Send a request; return the response, its body still unread, to be closed by the caller.

        A conversation goes to the same engine each time, for what it has cached of it, as long as
        that one answers. What an engine has not begun to answer, another one is asked. Raises
        RequestError (503): none answers.
        """
        reasons = []
        for url in self._order_engines(conversation):
            request = self._client.build_request(
                method, f"{url}{path}", headers=dict(headers), content=body
            )
            try:
                response = await self._client.send(request, stream=True)
            except httpx.HTTPError as error:
                reasons.append(f"{url}: {str(error) or type(error).__name__}")
                self._note_failure(url, reasons[-1])
                continue
            self._rests[url].reset()
            return response
        raise RequestError(
            f"no engine answers: {'; '.join(reasons)}",
            status=503,
            code="engine_unreachable",
            retry=RETRY_SECONDS,
        )

    async def list_models(self) -> dict[str, str]:
        """Return what an engine has loaded, a folder or a hub's name, by the model's name. Raises
        RequestError (503): none answers."""
        response = await self.send("GET", "/v1/models", {}, b"", "")
        try:
            listed = from_json(await response.aread()) if response.is_success else {}
        finally:
            await response.aclose()
        return {str(m["id"]): str(m.get("root") or m["id"]) for m in listed.get("data", ())}

    async def find_silent(self) -> list[str]:
        """Ask each engine for its models; return what is wrong with those that do not answer."""
        silent = []
        for url in self.urls:
            try:
                await self._client.get(f"{url}/v1/models", timeout=CONNECT_SECONDS)
            except httpx.HTTPError as error:
                silent.append(f"{url}: {str(error) or type(error).__name__}")
            else:
                self._rests[url].reset()
        return silent

    def _order_engines(self, conversation: str) -> list[str]:
        """Return the engines in the order in which a conversation asks them; those at rest last."""

        def rank(url: str) -> tuple[bool, bytes]:
            drawn = hashlib.sha256(f"{url}\n{conversation}".encode()).digest()
            return not self._rests[url].is_due(), drawn

        return sorted(self.urls, key=rank)

    def _note_failure(self, url: str, reason: str) -> None:
        if self._rests[url].is_due():  # not again by each of many requests
            wait = self._rests[url].record_failure()
            log.warning("The engine %s does not answer; it is asked again in %g s", reason, wait)
