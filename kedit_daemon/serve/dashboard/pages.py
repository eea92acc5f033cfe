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

from kedit_daemon.cli.context import database
from kedit_daemon.home import Home
from kedit_daemon.report.render import audit_figures, detail_fields, statement
from kedit_daemon.report.render_log import answered, event_said, event_told
from kedit_daemon.report.status import gather
from kedit_daemon.serve.dashboard.actions import ACTIONS, action_routes
from kedit_daemon.serve.dashboard.chart import HEIGHT, LEFT, RIGHT, WIDTH, draw
from kedit_daemon.serve.dashboard.health_series import charts, measured
from kedit_daemon.serve.dashboard.login import Guard
from kedit_daemon.serve.dashboard.rendering import Asked, Page, Shell
from kedit_daemon.system.timespec import moment
from memory.db.overview import overview
from memory.db.queries import (
    event_kinds,
    event_page,
    fact_detail,
    fact_page,
    facts_named,
    generation_rows,
    weights_facts_asking,
)
from memory.errors import KeditError
from memory.facts import ACTIVE, State, fill

if TYPE_CHECKING:
    import sqlite3

    from memory.side.side_memory import Match
    from policies.stability import Thresholds

LAST = 8  # changes on the overview
A_PAGE = 50  # events or facts
POINTS = (50, 200, 1000)  # measurements in a curve
GENERATIONS = 20
PROMPT_CHARS = 4000
TOKENS = (20, 40, 100, 200)  # lengths of an answer to choose from
DEFAULT_TOKENS = 40


@dataclass(frozen=True)
class Sides:
    """Two answers to one prompt, the generation that gave the edited one, and the fact of the side
    memory that fired, if one did."""

    edited: str
    base: str
    generation: int
    fired: "Match | None"


class AskBoth(Protocol):
    """Lets the edited and the unedited model go on from a prompt. Raises KeditError where it cannot
    be answered."""

    async def __call__(self, prompt: str, max_tokens: int) -> Sides: ...


@dataclass(frozen=True)
class Board:
    """What the pages are about, and what they work with."""

    home: Home
    thresholds: Callable[[], "Thresholds | None"]
    """Those that audits judge by; None as long as the model, which has its own, is not loaded."""
    clock: Callable[[], datetime]
    ask: AskBoth
    environ: Mapping[str, str]
    program: str = "kedit-daemon"
    """How people call the command line for this home."""
    monotonic: Callable[[], float] = time.monotonic


def routes(board: Board, token: str | None) -> list[BaseRoute]:
    """The pages, to be mounted at the root. `token`: what people sign in with, None where they need
    not. They look after their own sign-in, and nothing else may ask for it on these paths."""
    guard = Guard(token, board.clock, board.monotonic)
    shell = Shell(guard, board.clock, board.program)
    view = _Views(board)
    return [
        shell.page("/", view.overview),
        shell.page("/norms", view.norms),
        shell.page("/log", view.log),
        shell.page("/facts", view.facts),
        shell.page("/facts/{fact}", view.fact),
        shell.page("/ask", view.asking),
        shell.page("/ask", view.answered, "POST"),
        *action_routes(shell, board.home),
        *shell.fixed(),
    ]


class _Views:
    """A page each."""

    def __init__(self, board: Board) -> None:
        self.board, self.home = board, board.home

    def overview(self, _asked: Asked) -> Page:
        board = self.board
        found = gather(self.home, board.clock(), board.environ, board.program)
        events = []
        if self.home.database.is_file() and found["events"]:
            with database(self.home) as conn:
                events = [_told(conn, row) for row in event_page(conn, {}, None, LAST)]
        needs = [{**w, "page": _page_for(w["command"], board.program)} for w in found["warnings"]]
        audit = found["last_audit"]
        shown = {
            "found": found,
            "figures": audit_figures(audit) if audit else [],
            "events": events,
            "needs": needs,
            "actions": ACTIONS,
        }
        return Page("overview.html", "Overview", shown)

    def norms(self, asked: Asked) -> Page:
        most = _number(asked.query, "last", POINTS[0], POINTS)
        close = asked.query.get("view") == "close"
        with database(self.home) as conn:
            found = measured(conn, most)
            generations = generation_rows(conn, GENERATIONS)
            active = overview(conn)["generation"]
        thresholds = self.board.thresholds()
        drawn = [(chart, draw(chart, close)) for chart in charts(found, thresholds)]
        shown = {
            "measured": found,
            "judged": thresholds is not None,
            "drawn": drawn,
            "close": close,
            "most": most,
            "choices": POINTS,
            "generations": generations[::-1],
            "active": active,
            "size": {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT},
        }
        return Page("norms.html", "Norms", shown)

    def log(self, asked: Asked) -> Page:
        given = {n: asked.query.get(n, "").strip() for n in ("kind", "fact", "subject", "since")}
        wanted: dict[str, Any] = {name: text or None for name, text in given.items()}
        problem = None
        try:
            wanted["since"] = moment(given["since"], self.board.clock()) if given["since"] else None
        except ValueError as error:
            problem, wanted["since"] = str(error), None
        with database(self.home) as conn:
            rows = event_page(conn, wanted, _before(asked.query), A_PAGE + 1)
            kinds = event_kinds(conn)
            events = [_told(conn, row) for row in rows[:A_PAGE]]
        shown = {
            "events": events,
            "older": rows[A_PAGE - 1]["seq"] if len(rows) > A_PAGE else None,
            "paged": _before(asked.query) is not None,
            "kinds": kinds,
            "given": given,
            "problem": problem,
        }
        return Page("log.html", "Log", shown)

    def facts(self, asked: Asked) -> Page:
        text, state = (asked.query.get(name, "").strip() for name in ("text", "state"))
        state = state if state in set(State) else ""
        before = _before(asked.query)
        with database(self.home) as conn:
            rows = fact_page(conn, text or None, state or None, before, A_PAGE + 1)
            counts = overview(conn)["states"]
        shown = {
            "facts": rows[:A_PAGE],
            "older": rows[A_PAGE - 1]["seq"] if len(rows) > A_PAGE else None,
            "paged": before is not None,
            "counts": counts,
            "text": text,
            "state": state,
        }
        return Page("facts.html", "Facts", shown)

    def fact(self, asked: Asked) -> Page:
        with database(self.home) as conn:
            fact = _known(conn, asked.path["fact"])
            events = [_told(conn, {**row, "said": None}) for row in fact["events"][::-1]]
        near = [
            (n, fill(n["prompt"], fact["subject"])) for n in fact["record"].get("neighbours", ())
        ]
        told = ("state", "before", "after", "probe")
        shown = {
            "fact": fact,
            "fields": [(n, value) for n, value in detail_fields(fact) if n not in told],
            "also": [fill(p, fact["subject"]) for p in fact["record"].get("paraphrases", ())],
            "near": near,
            "events": events,
            "active": fact["state"] in ACTIVE,
        }
        return Page("fact.html", "Fact", shown)

    def asking(self, asked: Asked) -> Page:
        """The box; a fact's own question is in it, where one is named."""
        prompt = ""
        if name := asked.query.get("fact"):
            with database(self.home) as conn:
                fact = _known(conn, name)
            prompt = fill(fact["prompt"], fact["subject"])
        return self._box(prompt, DEFAULT_TOKENS)

    async def answered(self, asked: Asked) -> Page:
        prompt = asked.form.get("prompt", "")
        tokens = _number(asked.form, "tokens", DEFAULT_TOKENS, TOKENS)
        if not prompt.strip():
            return self._box(prompt, tokens, status=400, problem="Write something to go on from.")
        if len(prompt) > PROMPT_CHARS:
            problem = f"That is longer than {PROMPT_CHARS:,} characters."
            return self._box(prompt, tokens, status=400, problem=problem)
        sides = await self.board.ask(prompt, tokens)
        fired = await run_in_threadpool(self._fired, prompt, sides)
        return self._box(prompt, tokens, sides=sides, fired=fired)

    def _fired(self, prompt: str, sides: Sides) -> list[dict[str, Any]]:
        with database(self.home) as conn:
            if sides.fired is not None:
                return facts_named(conn, [sides.fired.fact_id])
            return weights_facts_asking(conn, prompt)

    def _box(self, prompt: str, tokens: int, status: int = 200, **more: Any) -> Page:
        shown = {
            "prompt": prompt,
            "tokens": tokens,
            "choices": TOKENS,
            "longest": PROMPT_CHARS,
            **{"sides": None, "fired": [], "problem": None, **more},
        }
        return Page("ask.html", "Ask", shown, status)


def _known(conn: "sqlite3.Connection", name: str) -> dict[str, Any]:
    fact = fact_detail(conn, name)
    if fact is None:
        raise KeditError(f"there is no fact {name}", code="unknown-fact", hint="look in Facts")
    return fact


def _told(conn: "sqlite3.Connection", row: Mapping[str, Any]) -> dict[str, Any]:
    """An event in words."""
    row = answered(conn, row)
    said = statement(row["said"]) if row["said"] else None
    return {**row, "said": event_said(row, said), "told": event_told(row)}


def _number(given: Mapping[str, str], name: str, default: int, choices: tuple[int, ...]) -> int:
    text = given.get(name, "")
    return next((choice for choice in choices if str(choice) == text), default)


def _before(query: Mapping[str, str]) -> int | None:
    """Where the page before this one ended; nonsense is the start."""
    text = query.get("before", "")
    return int(text) if re.fullmatch(r"[0-9]{1,15}", text) else None


def _page_for(command: str, program: str) -> str | None:
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
