"""Figures for Prometheus: of the server itself, and of the home from its database.

No label ever holds text of facts, prompts or subjects.
"""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kedit_daemon.home import Home
from kedit_daemon.ingest.failed_files import list_failed_files
from kedit_daemon.serve.inference.reader import AnswerEngine
from memory.db.overview import fetch_overview
from memory.db.queries import open_readonly
from memory.errors import KeditError

VERDICTS = ("keep", "warn", "consolidate", "revert")
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
NO_ROUTE = "none"


class ServerMetrics:
    """What the server counts, in a registry of its own."""

    def __init__(
        self, registry: CollectorRegistry, home: Home, clock: Callable[[], datetime]
    ) -> None:
        self.registry = registry
        self.request_counter = Counter(
            "kedit_http_requests",
            "Requests, by route and status.",
            ["route", "status"],
            registry=registry,
        )
        self.request_seconds = Histogram(
            "kedit_http_request_seconds",
            "Seconds from a request's beginning to the end of its answer.",
            ["route"],
            buckets=SECONDS_BUCKETS,
            registry=registry,
        )
        self.token_counter = Counter(
            "kedit_tokens",
            "Tokens read (prompt) and generated (completion).",
            ["kind"],
            registry=registry,
        )
        registry.register(HomeCollector(home, clock))

    def watch_engine(self, engine: AnswerEngine) -> None:
        """Tell of an engine too, from now on."""
        self.registry.register(EngineCollector(engine))

    def build_routes(self, gate: Middleware) -> list[Route]:
        """Where the figures are, behind a gate."""
        return [Route("/metrics", self.render_metrics, middleware=[gate])]

    async def render_metrics(self, request: Request) -> Response:
        """All figures, as Prometheus reads them."""
        text = await run_in_threadpool(generate_latest, self.registry)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})


class MetricsMiddleware:
    """Counts and times the requests of the app within it."""

    def __init__(self, app: ASGIApp, meters: ServerMetrics, monotonic: Callable[[], float]) -> None:
        self.app, self.metrics, self.monotonic = app, meters, monotonic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or what else a server says."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, began = "500", self.monotonic()

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, note)
        finally:
            # The pattern of the path: what stands in its place may be anything.
            route = getattr(scope.get("route"), "path", NO_ROUTE)
            self.metrics.request_counter.labels(route, status).inc()
            self.metrics.request_seconds.labels(route).observe(self.monotonic() - began)


class EngineCollector(Collector):
    """How the engine is at the moment of asking."""

    def __init__(self, engine: AnswerEngine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """The figures."""
        now = self.engine.status
        yield CounterMetricFamily("kedit_rows", "Answers taken on.", now.requests)
        yield GaugeMetricFamily("kedit_rows_running", "Answers being generated.", now.running)
        yield GaugeMetricFamily("kedit_rows_waiting", "Answers that wait.", now.waiting)
        what = "The generation that answers."
        yield GaugeMetricFamily("kedit_generation_served", what, now.generation)
        what = "Things of the home that could not be followed."
        yield GaugeMetricFamily("kedit_problems", what, len(now.problems))


class HomeCollector(Collector):
    """How the home is, by its database and folders."""

    def __init__(self, home: Home, clock: Callable[[], datetime]) -> None:
        self.home, self.clock = home, clock

    def collect(self) -> Iterator[Metric]:
        """The figures; of a database that cannot be read, only that."""
        try:
            with closing(open_readonly(self.home.database_file)) as conn:
                found = fetch_overview(conn, self.clock())
        except (KeditError, sqlite3.Error):
            found = None
        what = "Whether the database can be read."
        yield GaugeMetricFamily("kedit_database_readable", what, float(found is not None))
        what = "Files in failed/ that nobody has looked after."
        yield GaugeMetricFamily("kedit_inbox_failed_files", what, len(list_failed_files(self.home)))
        if found is not None:
            yield from self._collect_facts(found)
            if found["last_audit"] is not None:
                yield from self._collect_audit(found["last_audit"])

    def _collect_facts(self, found: dict[str, Any]) -> Iterator[Metric]:
        facts = GaugeMetricFamily("kedit_facts", "Facts, by state.", labels=["state"])
        for state, count in found["states"].items():
            facts.add_metric([state], count)
        yield facts
        oldest = found["oldest_received_at"]
        what = "Since the oldest fact that waits was taken in; 0 when none does."
        age = 0.0 if oldest is None else self._seconds_since(oldest)
        yield GaugeMetricFamily("kedit_oldest_waiting_seconds", what, age)
        yield GaugeMetricFamily("kedit_generation", "The active one.", found["generation"])

    def _seconds_since(self, moment: str) -> float:
        return (self.clock() - datetime.fromisoformat(moment)).total_seconds()

    def _collect_audit(self, audit: dict[str, Any]) -> Iterator[Metric]:
        figures = audit["figures"]
        norms = GaugeMetricFamily(
            "kedit_norm_ratio",
            "Norm of an edited matrix over the unedited one's, at the last audit.",
            labels=["layer"],
        )
        for layer, ratio in (figures.get("norm_ratio") or {}).items():
            norms.add_metric([layer], float(ratio))  # one that is not finite is kept as text
        yield norms
        verdict = GaugeMetricFamily(
            "kedit_audit_verdict", "1 for that of the last audit.", labels=["verdict"]
        )
        for name in VERDICTS:
            verdict.add_metric([name], float(name == audit["verdict"]))
        yield verdict
        what = "Since the last audit."
        yield GaugeMetricFamily("kedit_audit_age_seconds", what, self._seconds_since(audit["at"]))
        if "chain_intact" in figures:
            what = "Whether the chain of events was whole at the last audit."
            yield GaugeMetricFamily("kedit_chain_intact", what, float(figures["chain_intact"]))
