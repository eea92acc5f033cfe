"""The pages of the dashboard: the daemon's state, its facts, and its log.

They read the database, which they cannot write to, and ask the daemon for actions. So they show
what is known even when the daemon is dead.
"""

import re
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from starlette.routing import BaseRoute

from kedit_daemon.home import Home, open_database
from kedit_daemon.report.render import format_statement, list_audit_figures, list_fact_fields
from kedit_daemon.report.render_log import add_prior_answer, describe_event, find_event_statement
from kedit_daemon.report.status import gather_status
from kedit_daemon.serve.dashboard.actions import ACTIONS, build_action_routes
from kedit_daemon.serve.dashboard.ask_page import AskBoth, AskPage
from kedit_daemon.serve.dashboard.chart import HEIGHT, LEFT, RIGHT, WIDTH, draw_chart
from kedit_daemon.serve.dashboard.health_series import build_charts, load_measurements
from kedit_daemon.serve.dashboard.login import SessionGuard
from kedit_daemon.serve.dashboard.rendering import (
    DashboardPage,
    PageFrame,
    PageRequest,
    load_fact,
    parse_choice,
)
from kedit_daemon.system.timespec import parse_time
from memory.db.overview import fetch_overview
from memory.db.queries import (
    fetch_event_kinds,
    fetch_event_page,
    fetch_fact_page,
    fetch_generations,
)
from memory.facts import OPEN_STATES, FactState, fill_subject

if TYPE_CHECKING:
    import sqlite3

    from policies.health_limits import Thresholds

LAST_EVENTS = 8  # changes on the overview
PAGE_SIZE = 50  # events or facts
POINT_CHOICES = (50, 200, 1000)  # measurements in a curve
MAX_GENERATIONS = 20


@dataclass(frozen=True)
class DashboardContext:
    """The dependencies of the pages."""

    home: Home
    get_thresholds: Callable[[], "Thresholds | None"]
    """Returns the thresholds of audits; None until the model, which has its own, is loaded."""
    clock: Callable[[], datetime]
    ask_both: AskBoth
    environ: Mapping[str, str]
    program: str = "kedit-daemon"
    """The command line for this home."""
    monotonic: Callable[[], float] = time.monotonic


def build_routes(context: DashboardContext, token: str | None) -> list[BaseRoute]:
    """Return the routes of the dashboard, for the root of the site.

    token: the token for the sign-in; None: there is no sign-in. The pages check it themselves: no
    other gate may stand before these paths.
    """
    guard = SessionGuard(token, context.clock, context.monotonic)
    frame = PageFrame(guard, context.clock, context.program)
    views = _PageViews(context)
    return [
        frame.page_route("/", views.show_overview),
        frame.page_route("/norms", views.show_norms),
        frame.page_route("/log", views.show_log),
        frame.page_route("/facts", views.show_facts),
        frame.page_route("/facts/{fact}", views.show_fact),
        *AskPage(context.home, context.ask_both).build_routes(frame),
        *build_action_routes(frame, context.home),
        *frame.fixed_routes(),
    ]


class _PageViews:
    """The handlers of the pages."""

    def __init__(self, context: DashboardContext) -> None:
        self.context, self.home = context, context.home

    def show_overview(self, _request: PageRequest) -> DashboardPage:
        program = self.context.program
        status = gather_status(self.home, self.context.clock(), self.context.environ, program)
        events = []
        if self.home.database_file.is_file() and status["events"]:
            with open_database(self.home) as conn:
                rows = fetch_event_page(conn, {}, None, LAST_EVENTS)
                events = [_describe_event(conn, row) for row in rows]
        audit = status["last_audit"]
        context = {
            "status": status,
            "figures": list_audit_figures(audit) if audit else [],
            "events": events,
            "needs": [{**w, "page": _find_page(w["command"], program)} for w in status["warnings"]],
            "actions": ACTIONS,
        }
        return DashboardPage("overview.html", "Overview", context)

    def show_norms(self, request: PageRequest) -> DashboardPage:
        limit = parse_choice(request.query, "last", POINT_CHOICES[0], POINT_CHOICES)
        close = request.query.get("view") == "close"
        with open_database(self.home) as conn:
            measured = load_measurements(conn, limit)
            generations = fetch_generations(conn, MAX_GENERATIONS)
            active = fetch_overview(conn)["generation"]
        thresholds = self.context.get_thresholds()
        charts = build_charts(measured, thresholds)
        context = {
            "measured": measured,
            "judged": thresholds is not None,
            "drawn": [(chart, draw_chart(chart, close)) for chart in charts],
            "close": close,
            "limit": limit,
            "choices": POINT_CHOICES,
            "generations": generations[::-1],
            "active": active,
            "size": {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT},
        }
        return DashboardPage("norms.html", "Norms", context)

    def show_log(self, request: PageRequest) -> DashboardPage:
        given = {n: request.query.get(n, "").strip() for n in ("kind", "fact", "subject", "since")}
        filters: dict[str, Any] = {name: text or None for name, text in given.items()}
        problem, since = None, filters.pop("since")
        try:
            filters["since"] = parse_time(since, self.context.clock()) if since else None
        except ValueError as error:
            problem = str(error)
        before = _parse_before(request.query)
        with open_database(self.home) as conn:
            rows = fetch_event_page(conn, filters, before, PAGE_SIZE + 1)
            kinds = fetch_event_kinds(conn)
            events = [_describe_event(conn, row) for row in rows[:PAGE_SIZE]]
        context = {
            "events": events,
            "older": rows[PAGE_SIZE - 1]["seq"] if len(rows) > PAGE_SIZE else None,
            "paged": before is not None,
            "kinds": kinds,
            "given": given,
            "problem": problem,
        }
        return DashboardPage("log.html", "Log", context)

    def show_facts(self, request: PageRequest) -> DashboardPage:
        text, state = (request.query.get(name, "").strip() for name in ("text", "state"))
        state = state if state in set(FactState) else ""
        before = _parse_before(request.query)
        with open_database(self.home) as conn:
            rows = fetch_fact_page(conn, text or None, state or None, before, PAGE_SIZE + 1)
            counts = fetch_overview(conn)["states"]
        context = {
            "facts": rows[:PAGE_SIZE],
            "older": rows[PAGE_SIZE - 1]["seq"] if len(rows) > PAGE_SIZE else None,
            "paged": before is not None,
            "counts": counts,
            "text": text,
            "state": state,
        }
        return DashboardPage("facts.html", "Facts", context)

    def show_fact(self, request: PageRequest) -> DashboardPage:
        with open_database(self.home) as conn:
            fact = load_fact(conn, request.path["fact"])
            events = [_describe_event(conn, {**row, "said": None}) for row in fact["events"][::-1]]
        subject, record = fact["subject"], fact["record"]
        shown_above = ("state", "before", "after", "probe")
        context = {
            "fact": fact,
            "fields": [(n, value) for n, value in list_fact_fields(fact) if n not in shown_above],
            "paraphrases": [fill_subject(p, subject) for p in record.get("paraphrases", ())],
            "neighbours": [
                (n, fill_subject(n["prompt"], subject)) for n in record.get("neighbours", ())
            ],
            "events": events,
            "active": fact["state"] in OPEN_STATES,
        }
        return DashboardPage("fact.html", "Fact", context)


def _describe_event(conn: "sqlite3.Connection", row: Mapping[str, Any]) -> dict[str, Any]:
    """Return an event with its statement and its description."""
    row = add_prior_answer(conn, row)
    statement = find_event_statement(row, format_statement(row["said"]) if row["said"] else None)
    return {**row, "statement": statement, "details": describe_event(row)}


def _parse_before(query: Mapping[str, str]) -> int | None:
    """Return the number at which the page before this one ended; None for the first page."""
    text = query.get("before", "")
    return int(text) if re.fullmatch(r"[0-9]{1,15}", text) else None


def _find_page(command: str, program: str) -> str | None:
    """Return the page that does what a command does, if one does."""
    name, *rest = shlex.split(command.removeprefix(program)) or [""]
    if name in ACTIONS:
        return "/#actions"
    if name == "show" and re.fullmatch(r"[0-9a-f]{12}", rest[0]):
        return f"/facts/{rest[0]}"
    if name == "facts" and len(rest) == 2:
        return f"/facts?state={rest[1]}"
    if name == "log":
        return "/log?kind=audit"
    return None
