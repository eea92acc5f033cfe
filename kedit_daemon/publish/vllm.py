"""The client of a vLLM server: switches it to a new export. Knows only its HTTP API.

A LoRA becomes an adapter with a name of its own: one name for two versions would mix what the
server has cached of both. Weights are reloaded into the running model between two requests.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from typing import Any

from memory.errors import KeditError, Stopping

LOAD_SECONDS = 600.0  # for reading weights
PAUSE_SECONDS = 120.0  # for running requests to end
REQUEST_SECONDS = 10.0  # for what the server does at once
RESUME_TRIES = 3
_MAX_ERROR_CHARS = 300  # of the server's error text, in our own


def load_adapter(url: str, name: str, path: str) -> None:
    """Make the server offer the adapter in the folder `path` as the model `name`.

    A model of that name that is there already is that adapter. Raises KeditError when the server
    refuses.
    """
    try:
        _post_json(url, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
    except KeditError:
        if name not in _list_models(url):
            raise


def unload_adapter(url: str, name: str) -> None:
    """Make the server stop offering the adapter `name`; one that it does not have counts as done.

    Raises KeditError when the server keeps it, or does not answer.
    """
    try:
        _post_json(url, "/v1/unload_lora_adapter", {"lora_name": name}, REQUEST_SECONDS)
    except KeditError:
        if name in _list_models(url):
            raise


def reload_weights(url: str, path: str, stop_requested: Callable[[], bool]) -> None:
    """Make the server replace its weights by those in the folder `path`.

    It is paused meanwhile and resumed in any case. If the reload breaks off, the server may hold
    old and new weights until this is done again, but no cached prefixes of either. Raises
    KeditError when a step failed, and Stopping when a stop is requested before the weights are
    touched.
    """
    try:
        _post_json(url, "/pause?mode=wait", seconds=PAUSE_SECONDS)
        if stop_requested():
            raise Stopping("the daemon is stopping")
        try:
            call = {"method": "reload_weights", "kwargs": {"weights_path": path}}
            _post_json(url, "/collective_rpc", call)
        except KeditError:
            with suppress(KeditError):  # the first failure is the one to report
                _post_json(url, "/reset_prefix_cache")
            raise
        _post_json(url, "/reset_prefix_cache")
    finally:
        resume_server(url)


def resume_server(url: str, tries: int = RESUME_TRIES) -> None:
    """Resume a paused server. Raises KeditError when it does not answer, or refuses."""
    for tries_left in reversed(range(tries)):
        try:
            return _post_json(url, "/resume", seconds=REQUEST_SECONDS)
        except KeditError as error:
            if not tries_left:
                text = f"the server may still be paused: {error}"
                raise KeditError(text, code="publish", hint=f"POST {url}/resume") from error
            time.sleep(1.0)


def _list_models(url: str) -> set[str]:
    listed = json.loads(_send_request(url, "GET", "/v1/models", None, REQUEST_SECONDS))
    return {str(model["id"]) for model in listed["data"]}


def _post_json(
    url: str, path: str, body: dict[str, Any] | None = None, seconds: float = LOAD_SECONDS
) -> None:
    _send_request(url, "POST", path, body, seconds)


def _send_request(
    url: str, method: str, path: str, body: dict[str, Any] | None, seconds: float
) -> bytes:
    import httpx  # here, since most daemons publish to no server

    try:  # the server is on this machine or in its network: no proxy of the environment
        answer = httpx.request(method, f"{url}{path}", json=body, timeout=seconds, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = str(error) or type(error).__name__
        raise KeditError(f"{url}{path}: {reason}", code="publish") from error
    if answer.status_code != HTTPStatus.OK:
        text = f"{url}{path} answered {answer.status_code}: {answer.text[:_MAX_ERROR_CHARS]}"
        raise KeditError(text, code="publish")
    return answer.content
