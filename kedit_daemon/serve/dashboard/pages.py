"""The dashboard: how the daemon is, what it knows, and what changed, for people.

It reads the database, which it cannot write to, and has the daemon do what people ask for. So it
shows what is known even when the daemon is dead.
"""

import re
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from starlette.concurrency import run_in_threadpool
from starlette.routing import BaseRoute

from kedit_daemon.home import Home, open_database
from kedit_daemon.report.render import format_statement, list_audit_figures, list_fact_fields
from kedit_daemon.report.render_log import add_prior_answer, describe_event, find_event_statement
from kedit_daemon.report.status import gather_status
from kedit_daemon.serve.dashboard.actions import ACTIONS, build_action_routes
from kedit_daemon.serve.dashboard.chart import HEIGHT, LEFT, RIGHT, WIDTH, draw_chart
from kedit_daemon.serve.dashboard.health_series import build_charts, load_measurements
from kedit_daemon.serve.dashboard.login import SessionGuard
from kedit_daemon.serve.dashboard.rendering import DashboardPage, PageFrame, PageRequest
from kedit_daemon.system.timespec import parse_time
from memory.db.overview import fetch_overview
from memory.db.queries import (
    fetch_event_kinds,
    fetch_event_page,
    fetch_fact_detail,
    fetch_fact_page,
    fetch_facts_by_id,
    fetch_generations,
    find_weights_facts,
)
from memory.errors import KeditError
from memory.facts import ACTIVE_STATES, FactState, fill_subject

if TYPE_CHECKING:
    import sqlite3

    from memory.side.side_memory import RoutingMatch
    from policies.stability import Thresholds

LAST_EVENTS = 8  # changes on the overview
PAGE_SIZE = 50  # events or facts
POINT_CHOICES = (50, 200, 1000)  # measurements in a curve
MAX_GENERATIONS = 20
MAX_PROMPT_CHARS = 4000
TOKEN_CHOICES = (20, 40, 100, 200)  # lengths of an answer to choose from
DEFAULT_TOKENS = 40


@dataclass(frozen=True)
class AnswerPair:
    """Two answers to one prompt, the generation that gave the edited one, and the fact of the side
    memory that fired, if one did."""

    edited: str
    base: str
    generation: int
    fired: "RoutingMatch | None"


class AskBothModels(Protocol):
    """Lets the edited and the unedited model go on from a prompt. Raises KeditError where it cannot
    be answered."""

    async def __call__(self, prompt: str, max_tokens: int) -> AnswerPair: ...


@dataclass(frozen=True)
class DashboardContext:
    """What the pages are about, and what they work with."""

    home: Home
    get_thresholds: Callable[[], "Thresholds | None"]
    """Those that audits judge by; None as long as the model, which has its own, is not loaded."""
    clock: Callable[[], datetime]
    ask_both: AskBothModels
    environ: Mapping[str, str]
    program: str = "kedit-daemon"
    """How people call the command line for this home."""
    monotonic: Callable[[], float] = time.monotonic


def build_routes(board: DashboardContext, token: str | None) -> list[BaseRoute]:
    """The pages, to be mounted at the root. `token`: what people sign in with, None where they need
    not. They look after their own sign-in, and nothing else may ask for it on these paths."""
    guard = SessionGuard(token, board.clock, board.monotonic)
    shell = PageFrame(guard, board.clock, board.program)
    view = _PageViews(board)
    return [
        shell.page_route("/", view.show_overview),
        shell.page_route("/norms", view.show_norms),
        shell.page_route("/log", view.show_log),
        shell.page_route("/facts", view.show_facts),
        shell.page_route("/facts/{fact}", view.show_fact),
        shell.page_route("/ask", view.show_ask_form),
        shell.page_route("/ask", view.answer_prompt, "POST"),
        *build_action_routes(shell, board.home),
        *shell.fixed_routes(),
    ]


class _PageViews:
    """A page each."""

    def __init__(self, board: DashboardContext) -> None:
        self.context, self.home = board, board.home

    def show_overview(self, _asked: PageRequest) -> DashboardPage:
        board = self.context
        found = gather_status(self.home, board.clock(), board.environ, board.program)
        events = []
        if self.home.database_file.is_file() and found["events"]:
            with open_database(self.home) as conn:
                events = [
                    _describe_event(conn, row)
                    for row in fetch_event_page(conn, {}, None, LAST_EVENTS)
                ]
        needs = [{**w, "page": _find_page(w["command"], board.program)} for w in found["warnings"]]
        audit = found["last_audit"]
        shown = {
            "found": found,
            "figures": list_audit_figures(audit) if audit else [],
            "events": events,
            "needs": needs,
            "actions": ACTIONS,
        }
        return DashboardPage("overview.html", "Overview", shown)

    def show_norms(self, asked: PageRequest) -> DashboardPage:
        most = _parse_choice(asked.query, "last", POINT_CHOICES[0], POINT_CHOICES)
        close = asked.query.get("view") == "close"
        with open_database(self.home) as conn:
            found = load_measurements(conn, most)
            generations = fetch_generations(conn, MAX_GENERATIONS)
            active = fetch_overview(conn)["generation"]
        thresholds = self.context.get_thresholds()
        drawn = [(chart, draw_chart(chart, close)) for chart in build_charts(found, thresholds)]
        shown = {
            "measured": found,
            "judged": thresholds is not None,
            "drawn": drawn,
            "close": close,
            "most": most,
            "choices": POINT_CHOICES,
            "generations": generations[::-1],
            "active": active,
            "size": {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT},
        }
        return DashboardPage("norms.html", "Norms", shown)

    def show_log(self, asked: PageRequest) -> DashboardPage:
        given = {n: asked.query.get(n, "").strip() for n in ("kind", "fact", "subject", "since")}
        wanted: dict[str, Any] = {name: text or None for name, text in given.items()}
        problem = None
        try:
            wanted["since"] = (
                parse_time(given["since"], self.context.clock()) if given["since"] else None
            )
        except ValueError as error:
            problem, wanted["since"] = str(error), None
        with open_database(self.home) as conn:
            rows = fetch_event_page(conn, wanted, _parse_before(asked.query), PAGE_SIZE + 1)
            kinds = fetch_event_kinds(conn)
            events = [_describe_event(conn, row) for row in rows[:PAGE_SIZE]]
        shown = {
            "events": events,
            "older": rows[PAGE_SIZE - 1]["seq"] if len(rows) > PAGE_SIZE else None,
            "paged": _parse_before(asked.query) is not None,
            "kinds": kinds,
            "given": given,
            "problem": problem,
        }
        return DashboardPage("log.html", "Log", shown)

    def show_facts(self, asked: PageRequest) -> DashboardPage:
        text, state = (asked.query.get(name, "").strip() for name in ("text", "state"))
        state = state if state in set(FactState) else ""
        before = _parse_before(asked.query)
        with open_database(self.home) as conn:
            rows = fetch_fact_page(conn, text or None, state or None, before, PAGE_SIZE + 1)
            counts = fetch_overview(conn)["states"]
        shown = {
            "facts": rows[:PAGE_SIZE],
            "older": rows[PAGE_SIZE - 1]["seq"] if len(rows) > PAGE_SIZE else None,
            "paged": before is not None,
            "counts": counts,
            "text": text,
            "state": state,
        }
        return DashboardPage("facts.html", "Facts", shown)

    def show_fact(self, asked: PageRequest) -> DashboardPage:
        with open_database(self.home) as conn:
            fact = _load_fact(conn, asked.path["fact"])
            events = [_describe_event(conn, {**row, "said": None}) for row in fact["events"][::-1]]
        near = [
            (n, fill_subject(n["prompt"], fact["subject"]))
            for n in fact["record"].get("neighbours", ())
        ]
        told = ("state", "before", "after", "probe")
        shown = {
            "fact": fact,
            "fields": [(n, value) for n, value in list_fact_fields(fact) if n not in told],
            "also": [
                fill_subject(p, fact["subject"]) for p in fact["record"].get("paraphrases", ())
            ],
            "near": near,
            "events": events,
            "active": fact["state"] in ACTIVE_STATES,
        }
        return DashboardPage("fact.html", "Fact", shown)

    def show_ask_form(self, asked: PageRequest) -> DashboardPage:
        """The box; a fact's own question is in it, where one is named."""
        prompt = ""
        if name := asked.query.get("fact"):
            with open_database(self.home) as conn:
                fact = _load_fact(conn, name)
            prompt = fill_subject(fact["prompt"], fact["subject"])
        return self._build_ask_page(prompt, DEFAULT_TOKENS)

    async def answer_prompt(self, asked: PageRequest) -> DashboardPage:
        prompt = asked.form.get("prompt", "")
        tokens = _parse_choice(asked.form, "tokens", DEFAULT_TOKENS, TOKEN_CHOICES)
        if not prompt.strip():
            return self._build_ask_page(
                prompt, tokens, status=400, problem="Write something to go on from."
            )
        if len(prompt) > MAX_PROMPT_CHARS:
            problem = f"That is longer than {MAX_PROMPT_CHARS:,} characters."
            return self._build_ask_page(prompt, tokens, status=400, problem=problem)
        sides = await self.context.ask_both(prompt, tokens)
        fired = await run_in_threadpool(self._find_fired, prompt, sides)
        return self._build_ask_page(prompt, tokens, sides=sides, fired=fired)

    def _find_fired(self, prompt: str, sides: AnswerPair) -> list[dict[str, Any]]:
        with open_database(self.home) as conn:
            if sides.fired is not None:
                return fetch_facts_by_id(conn, [sides.fired.fact_id])
            return find_weights_facts(conn, prompt)

    def _build_ask_page(
        self, prompt: str, tokens: int, status: int = 200, **more: Any
    ) -> DashboardPage:
        shown = {
            "prompt": prompt,
            "tokens": tokens,
            "choices": TOKEN_CHOICES,
            "longest": MAX_PROMPT_CHARS,
            **{"sides": None, "fired": [], "problem": None, **more},
        }
        return DashboardPage("ask.html", "Ask", shown, status)


def _load_fact(conn: "sqlite3.Connection", name: str) -> dict[str, Any]:
    fact = fetch_fact_detail(conn, name)
    if fact is None:
        raise KeditError(f"there is no fact {name}", code="unknown-fact", hint="look in Facts")
    return fact


def _describe_event(conn: "sqlite3.Connection", row: Mapping[str, Any]) -> dict[str, Any]:
    """An event in words."""
    row = add_prior_answer(conn, row)
    said = format_statement(row["said"]) if row["said"] else None
    return {**row, "said": find_event_statement(row, said), "told": describe_event(row)}


def _parse_choice(
    given: Mapping[str, str], name: str, default: int, choices: tuple[int, ...]
) -> int:
    text = given.get(name, "")
    return next((choice for choice in choices if str(choice) == text), default)


def _parse_before(query: Mapping[str, str]) -> int | None:
    """Where the page before this one ended; nonsense is the start."""
    text = query.get("before", "")
    return int(text) if re.fullmatch(r"[0-9]{1,15}", text) else None


def _find_page(command: str, program: str) -> str | None:
    """Where on these pages one may do what a command does."""
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
