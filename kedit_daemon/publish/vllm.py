"""What a vLLM server is told when there is something new to serve. Knows only its HTTP API.

A LoRA becomes an adapter with a name of its own: one name for two versions would mix what the
server has cached of both. Weights are laid over the running model between two requests.
"""

import http.client
import json
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from memory.errors import KeditError, Stopping

LOAD_SECONDS = 600.0  # for weights to be read
PAUSE_SECONDS = 120.0  # for requests that run to their end
REQUEST_SECONDS = 10.0  # for what is done at once
RESUME_TRIES = 3
_MAX_ERROR_CHARS = 300  # characters of a server's complaint that are passed on


def load_adapter(url: str, name: str, path: str) -> None:
    """Let the server offer the adapter in the folder `path` as the model `name`.

    One that is there already is that adapter. Raises KeditError when the server refuses.
    """
    try:
        _post_json(url, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
    except KeditError:
        if name not in _list_models(url):
            raise


def unload_adapter(url: str, name: str) -> None:
    """Let the server no longer offer the model `name`, an adapter.

    One that is not there is unloaded. Raises KeditError when the server keeps it, or is not there.
    """
    try:
        _post_json(url, "/v1/unload_lora_adapter", {"lora_name": name}, REQUEST_SECONDS)
    except KeditError:
        if name in _list_models(url):
            raise


def reload_weights(url: str, path: str, ending: Callable[[], bool]) -> None:
    """Let the server lay the weights in the folder `path` over its own.

    It works on again in any case, also where a step failed. Where the weights could not be laid
    over to the last one, old and new ones may be mixed in it until this is done again; but nothing
    that it has cached of others. Raises KeditError when a step failed, and with the code "stopping"
    when `ending` says so before the weights are touched.
    """
    try:
        _post_json(url, "/pause?mode=wait", seconds=PAUSE_SECONDS)
        if ending():
            raise Stopping("the daemon is stopping")
        try:
            given = {"method": "reload_weights", "kwargs": {"weights_path": path}}
            _post_json(url, "/collective_rpc", given)
        except KeditError:
            with suppress(KeditError):  # the first failure is the one to tell of
                _post_json(url, "/reset_prefix_cache")
            raise
        _post_json(url, "/reset_prefix_cache")
    finally:
        resume_server(url)


def resume_server(url: str, tries: int = RESUME_TRIES) -> None:
    """Let a server that was told to pause go on. Raises KeditError when it cannot be told."""
    for left in reversed(range(tries)):
        try:
            _post_json(url, "/resume", seconds=REQUEST_SECONDS)
            return
        except KeditError as error:
            if not left:
                text = f"the server may stand still: {error}"
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
    parts = urlsplit(url)
    link = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=seconds)
    headers = {} if body is None else {"Content-Type": "application/json"}
    try:
        link.request(method, path, None if body is None else json.dumps(body), headers)
        answer = link.getresponse()
        said = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise KeditError(f"{url}{path}: {error or type(error).__name__}", code="publish") from error
    finally:
        link.close()
    if answer.status != http.HTTPStatus.OK:
        text = said[:_MAX_ERROR_CHARS].decode(errors="replace")
        raise KeditError(f"{url}{path} answered {answer.status}: {text}", code="publish")
    return said
