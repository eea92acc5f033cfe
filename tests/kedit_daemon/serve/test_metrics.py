"""Figures for Prometheus."""

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import httpx
import pytest
from command_line import NOW
from editing_home import seat
from home_tools import ROME
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from serving import NAME, Running, server

from kedit_daemon.home import Home
from kedit_daemon.serve.metrics import HomeCollector
from memory.db.store import Store
from memory.facts import FactState


@pytest.fixture
def running(tmp_path: Path, model_folder: Callable[[str], Path]) -> Iterator[Running]:
    with server(tmp_path / "home", model_folder("llama")) as found:
        yield found


def samples(text: str) -> dict[tuple[str, ...], float]:
    """Name and values of labels -> value."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_requests_and_tokens_are_counted(running: Running) -> None:
    with running.http() as http:
        asked = {"model": NAME, "prompt": "Rome", "max_tokens": 3, "n": 2, "temperature": 0}
        read = http.post("/v1/completions", json=asked).json()["usage"]["prompt_tokens"]
        http.post("/v1/completions", json=asked | {"stream": True})
        http.post("/v1/completions", json={})
        http.get("/secret-path")
        http.get("/v1/models/secret-name")
        text = http.get("/metrics").text
    found = samples(text)
    route = "/v1/completions"
    assert found["kedit_http_requests_total", route, "200"] == 2
    assert found["kedit_http_requests_total", route, "400"] == 1
    assert found["kedit_http_requests_total", "none", "404"] == 1
    assert found["kedit_http_requests_total", "/v1/models/{name:path}", "404"] == 1
    assert found["kedit_http_request_seconds_count", route] == 3
    assert 0 < found["kedit_http_request_seconds_sum", route] < 20
    assert found["kedit_tokens_total", "prompt"] == 2 * read
    assert found["kedit_tokens_total", "completion"] == 12
    assert "secret" not in text


def test_the_engine_is_told_of(running: Running) -> None:
    with running.http() as http:
        asked = {"model": NAME, "prompt": "Rome", "max_tokens": 200, "n": 2, "stream": True}
        running.pace.seconds = 0.02
        with http.stream("POST", "/v1/completions", json=asked):
            found = samples(httpx.get(f"{running.url}/metrics").text)
    assert found["kedit_rows_total",] == found["kedit_rows_running",] == 2
    assert found["kedit_rows_waiting",] == 0
    assert (found["kedit_generation_served",], found["kedit_problems",]) == (0, 0)


def test_the_home_is_told_of_and_no_text_of_facts(running: Running) -> None:
    store = Store(running.home.database_file, lambda: NOW - timedelta(seconds=90))
    figures = {"norm_ratio": {"2": 1.25, "3": "inf"}, "chain_intact": True}
    with store.db.transaction():
        store.add_audit(0, "warn", figures, [], 0.5)
    store.close()
    (running.home.inbox_folder / "failed" / "a.jsonl.error.json").write_text("{}")
    with running.http() as http:
        text = http.get("/metrics").text
    found = samples(text)
    assert found["kedit_database_readable",] == 1
    assert found["kedit_facts", "live-side"] == 1
    assert found["kedit_facts", "failed"] == 0
    assert found["kedit_generation",] == 0
    assert found["kedit_norm_ratio", "2"] == 1.25
    assert found["kedit_norm_ratio", "3"] == float("inf")
    assert found["kedit_audit_verdict", "warn"] == 1
    assert found["kedit_audit_verdict", "keep"] == 0
    assert found["kedit_audit_age_seconds",] == 90
    assert found["kedit_chain_intact",] == 1
    assert found["kedit_inbox_failed_files",] == 1
    assert ROME.subject not in text and ROME.target not in text


def test_a_home_without_a_database_is_told_of_too(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    registry.register(HomeCollector(Home(tmp_path), lambda: NOW))
    assert registry.get_sample_value("kedit_database_readable") == 0
    assert registry.get_sample_value("kedit_facts", {"state": "failed"}) is None


def test_the_fact_that_has_waited_longest_is_told_of(tmp_path: Path) -> None:
    home, registry = Home(tmp_path), CollectorRegistry()
    home.create_folders()
    times = [NOW - timedelta(minutes=20)]
    store = Store(home.database_file, lambda: times[-1])
    registry.register(HomeCollector(home, lambda: NOW))
    assert registry.get_sample_value("kedit_oldest_waiting_seconds") == 0
    with store.db.transaction():
        store.receive_fact(seat(1), "a.jsonl", False)
        times.append(NOW)
        store.receive_fact(seat(2), "a.jsonl", False)
    assert registry.get_sample_value("kedit_oldest_waiting_seconds") == 1200
    with store.db.transaction():
        store.change_state(seat(1).id, FactState.LIVE_SIDE)
    store.close()
    assert registry.get_sample_value("kedit_oldest_waiting_seconds") == 0
