"""What a vLLM server hears, and what becomes of its refusals."""

import threading
from collections.abc import Iterator

import pytest
from vllm_tools import Server, serving

from kedit_daemon.publish import vllm
from kedit_daemon.publish.vllm import load_adapter, reload_weights, unload_adapter
from memory.errors import KeditError


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as made:
        yield made


def never() -> bool:
    return False


def test_an_adapter_is_loaded_under_a_name_of_its_own(server: Server) -> None:
    load_adapter(server.url, "m-gen-3-lora-ab", "/srv/m-gen-3-lora-ab")
    told = {"lora_name": "m-gen-3-lora-ab", "lora_path": "/srv/m-gen-3-lora-ab"}
    assert server.calls == [("/v1/load_lora_adapter", told)]


def test_an_adapter_that_is_there_already_is_no_failure(server: Server) -> None:
    server.failing = {"/v1/load_lora_adapter": 2}
    server.models = ["base", "a"]
    load_adapter(server.url, "a", "/srv/a")
    assert server.paths == ["/v1/load_lora_adapter", "/v1/models"]
    with pytest.raises(KeditError, match=r"load_lora_adapter answered 500.*no room"):
        load_adapter(server.url, "b", "/srv/b")


def test_weights_are_laid_over_while_the_server_pauses(server: Server) -> None:
    reload_weights(server.url, "/srv/x", never)
    assert server.calls == [
        ("/pause?mode=wait", None),
        (
            "/collective_rpc",
            {"method": "reload_weights", "kwargs": {"weights_path": "/srv/x"}},
        ),
        ("/reset_prefix_cache", None),
        ("/resume", None),
    ]


@pytest.mark.parametrize("failing", ["/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache"])
def test_the_server_goes_on_where_a_step_failed(server: Server, failing: str) -> None:
    server.failing = {failing: 1}
    with pytest.raises(KeditError, match="answered 500"):
        reload_weights(server.url, "/srv/x", never)
    last = [failing, "/resume"]
    if failing == "/collective_rpc":  # some tensors may have been changed
        last.insert(1, "/reset_prefix_cache")
    assert server.paths[-len(last) :] == last


def test_the_first_failure_is_the_one_that_is_told(server: Server) -> None:
    server.failing = {"/collective_rpc": 1, "/reset_prefix_cache": 1}
    with pytest.raises(KeditError, match="collective_rpc answered 500"):
        reload_weights(server.url, "/srv/x", never)
    assert server.paths[-1] == "/resume"


def test_requests_that_do_not_end_are_not_waited_for_for_ever(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm, "PAUSE_SECONDS", 0.2)
    over = threading.Event()

    def busy(path: str) -> None:
        if path.startswith("/pause"):
            over.wait(30)

    server.seen = busy
    try:
        with pytest.raises(KeditError, match=r"pause.*timed out"):
            reload_weights(server.url, "/srv/x", never)
        assert server.paths == ["/pause?mode=wait", "/resume"]
    finally:
        over.set()


def test_no_weights_are_touched_once_it_is_to_end(server: Server) -> None:
    with pytest.raises(KeditError, match="stopping"):
        reload_weights(server.url, "/srv/x", lambda: True)
    assert server.paths == ["/pause?mode=wait", "/resume"]


def test_an_adapter_is_unloaded_and_one_that_is_not_there_is_no_failure(server: Server) -> None:
    unload_adapter(server.url, "a")
    assert server.calls == [("/v1/unload_lora_adapter", {"lora_name": "a"})]
    server.failing = {"/v1/unload_lora_adapter": 2}
    server.models = ["base", "b"]
    unload_adapter(server.url, "a")
    with pytest.raises(KeditError, match="unload_lora_adapter answered 500"):
        unload_adapter(server.url, "b")


def test_resuming_is_tried_again(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.time, "sleep", lambda _seconds: None)
    server.failing = {"/resume": 2}
    reload_weights(server.url, "/srv/x", never)
    assert server.paths[-3:] == ["/resume"] * 3
    server.failing = {"/resume": 3}
    with pytest.raises(KeditError, match="may still be paused"):
        reload_weights(server.url, "/srv/x", never)


def test_a_proxy_of_the_environment_is_not_used(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    load_adapter(server.url, "a", "/srv/a")
    assert server.paths == ["/v1/load_lora_adapter"]


def test_a_server_that_is_not_there(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.time, "sleep", lambda _seconds: None)
    with pytest.raises(KeditError, match=r"127\.0\.0\.1:9"):
        load_adapter("http://127.0.0.1:9", "a", "/srv/a")
    with pytest.raises(KeditError, match="99999"):
        load_adapter("http://127.0.0.1:99999", "a", "/srv/a")
    with pytest.raises(KeditError, match="may still be paused"):
        reload_weights("http://127.0.0.1:9", "/srv/a", never)
