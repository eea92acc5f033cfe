"""Metrics for Prometheus: of the server itself, and of the home from its database.

No label ever holds text of facts, prompts or subjects.
"""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime
from typing import TYPE_CHECKING, Any

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
from memory.db.overview import fetch_overview
from memory.db.queries import open_readonly
from memory.errors import KeditError

if TYPE_CHECKING:
    from kedit_daemon.serve.inference.engine import BatchEngine

VERDICTS = ("keep", "warn", "consolidate", "revert")
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
NO_ROUTE = "none"


class ServerMetrics:
    """The counters of one server, in a registry of its own."""

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
        self.routed_counter = Counter(
            "kedit_routed",
            "Requests passed on to engines, by how facts were put in: none, context or adapter.",
            ["by"],
            registry=registry,
        )
        registry.register(HomeCollector(home, clock))

    def watch_engine(self, engine: "BatchEngine") -> None:
        """Report an engine too, from now on."""
        self.registry.register(EngineCollector(engine))

    def build_routes(self, gate: Middleware) -> list[Route]:
        """Return the route of the metrics, behind a gate."""
        return [Route("/metrics", self.render_metrics, middleware=[gate])]

    async def render_metrics(self, request: Request) -> Response:
        """Return all metrics in Prometheus' text format."""
        text = await run_in_threadpool(generate_latest, self.registry)
        return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})


class MetricsMiddleware:
    """Counts and times the requests of an application."""

    def __init__(self, app: ASGIApp, meters: ServerMetrics, monotonic: Callable[[], float]) -> None:
        self.app, self.metrics, self.monotonic = app, meters, monotonic

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request; other messages of a server pass through."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, began = "500", self.monotonic()

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, send_and_note_status)
        finally:
            # The pattern of the path: the path itself may hold any text.
            route = getattr(scope.get("route"), "path", NO_ROUTE)
            self.metrics.request_counter.labels(route, status).inc()
            self.metrics.request_seconds.labels(route).observe(self.monotonic() - began)


class EngineCollector(Collector):
    """Reports the state of an engine."""

    def __init__(self, engine: "BatchEngine") -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics."""
        status = self.engine.status
        yield CounterMetricFamily("kedit_rows", "Answers accepted.", status.requests)
        yield GaugeMetricFamily("kedit_rows_running", "Answers being generated.", status.running)
        yield GaugeMetricFamily("kedit_rows_waiting", "Answers that wait.", status.waiting)
        what = "The generation that answers."
        yield GaugeMetricFamily("kedit_generation_served", what, status.generation)
        what = "Published changes that the server could not follow."
        yield GaugeMetricFamily("kedit_problems", what, len(status.problems))


class HomeCollector(Collector):
    """Reports the state of a home, by its database and folders."""

    def __init__(self, home: Home, clock: Callable[[], datetime]) -> None:
        self.home, self.clock = home, clock

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics; without a readable database, only those that need none."""
        try:
            with closing(open_readonly(self.home.database_file)) as conn:
                overview = fetch_overview(conn, self.clock())
        except (KeditError, sqlite3.Error):
            overview = None
        what = "Whether the database can be read."
        yield GaugeMetricFamily("kedit_database_readable", what, float(overview is not None))
        what = "Files in failed/ that nobody has dealt with."
        yield GaugeMetricFamily("kedit_inbox_failed_files", what, len(list_failed_files(self.home)))
        if overview is not None:
            yield from self._collect_facts(overview)
            if overview["last_audit"] is not None:
                yield from self._collect_audit(overview["last_audit"])

    def _collect_facts(self, overview: dict[str, Any]) -> Iterator[Metric]:
        facts = GaugeMetricFamily("kedit_facts", "Facts, by state.", labels=["state"])
        for state, count in overview["states"].items():
            facts.add_metric([state], count)
        yield facts
        oldest = overview["oldest_received_at"]
        what = "Seconds since the oldest waiting fact was received; 0 if none waits."
        age = 0.0 if oldest is None else self._seconds_since(oldest)
        yield GaugeMetricFamily("kedit_oldest_waiting_seconds", what, age)
        yield GaugeMetricFamily(
            "kedit_generation", "The active generation.", overview["generation"]
        )

    def _seconds_since(self, timestamp: str) -> float:
        return (self.clock() - datetime.fromisoformat(timestamp)).total_seconds()

    def _collect_audit(self, audit: dict[str, Any]) -> Iterator[Metric]:
        figures = audit["figures"]
        norms = GaugeMetricFamily(
            "kedit_norm_ratio",
            "Norm of an edited matrix over the unedited one's, at the last audit.",
            labels=["layer"],
        )
        for layer, ratio in (figures.get("norm_ratio") or {}).items():
            norms.add_metric([layer], float(ratio))  # NaN and infinity are stored as text
        yield norms
        verdict = GaugeMetricFamily(
            "kedit_audit_verdict", "1 for the verdict of the last audit.", labels=["verdict"]
        )
        for name in VERDICTS:
            verdict.add_metric([name], float(name == audit["verdict"]))
        yield verdict
        what = "Seconds since the last audit."
        yield GaugeMetricFamily("kedit_audit_age_seconds", what, self._seconds_since(audit["at"]))
        if "chain_intact" in figures:
            what = "Whether the chain of events was whole at the last audit."
            yield GaugeMetricFamily("kedit_chain_intact", what, float(figures["chain_intact"]))
