"""Actions of the dashboard: each is tried first, and done once its figures have been seen.

The daemon does them, asked over its socket: nothing here writes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.routing import BaseRoute

from kedit_daemon.control import send_request
from kedit_daemon.home import Home, open_database
from kedit_daemon.report.render_log import list_measured_figures, list_outcome
from kedit_daemon.serve.dashboard.rendering import DashboardPage, PageFrame, PageRequest
from memory.db.queries import fetch_facts_by_id
from memory.errors import BadRequest

_GROUP_TITLES = {
    "flushed": "Into the weights",
    "kept": "Kept in the side memory",
    "failed": "Not held",
    "quarantined": "Into quarantine",
    "reverted": "Taken out",
    "restored": "Live again",
    "learned_anew": "Learned again",
}


@dataclass(frozen=True)
class DashboardAction:
    """The texts of a command of the daemon."""

    title: str
    button: str
    about: str
    grave: bool = False


ACTIONS = {
    "audit": DashboardAction(
        "Audit",
        "Audit now",
        "The health of the weights is measured, judged and logged, and the verdict is carried out.",
    ),
    "flush": DashboardAction(
        "Flush",
        "Flush now",
        "Facts that wait, and those in the side memory, are moved into the weights.",
    ),
    "consolidate": DashboardAction(
        "Consolidate",
        "Consolidate now",
        "The weights are solved again over all live facts, and kept if nothing gets worse.",
    ),
    "revert": DashboardAction(
        "Revert",
        "Take it out",
        "The weights are solved again without the fact, exactly. The log keeps it.",
        grave=True,
    ),
    "go-back": DashboardAction(
        "Go back",
        "Go back",
        "The weights hold the facts of that generation again: those that came since are reverted,"
        " those that ended since are live again.",
        grave=True,
    ),
}


def build_action_routes(shell: PageFrame, home: Home) -> list[BaseRoute]:
    """Return two routes per action: its trial, and the action itself. Both take a form."""
    routes = []
    for name, action in ACTIONS.items():
        for path, dry_run in ((f"/actions/{name}/try", True), (f"/actions/{name}", False)):
            handler = partial(_run_action, home, name, action, dry_run)
            routes.append(shell.page_route(path, handler, "POST"))
    return routes


def _run_action(
    home: Home, name: str, action: DashboardAction, dry_run: bool, request: PageRequest
) -> DashboardPage:
    command, arguments = _parse_arguments(name, request.form)
    reply = send_request(home.socket_file, command, {**arguments, "dry_run": dry_run})
    answers = reply.get("answers", {})
    groups = {title: reply[key] for key, title in _GROUP_TITLES.items() if reply.get(key)}
    with open_database(home) as conn:
        named = {*answers, *(fact_id for ids in groups.values() for fact_id in ids)}
        rows = {row["id"]: row for row in fetch_facts_by_id(conn, named)}
    context = {
        "name": name,
        "action": action,
        "form": request.form,
        "groups": {title: [rows[n] for n in ids if n in rows] for title, ids in groups.items()},
        "answers": [(rows[n], pair) for n, pair in answers.items() if n in rows],
        "outcome": list_outcome(reply),
        "measured": list_measured_figures(reply),
        "verdict": reply.get("verdict"),
        "changed": reply["taken"] if "taken" in reply else bool(groups) or name == "audit",
    }
    title = f"{action.title}: what would happen" if dry_run else f"{action.title}: done"
    return DashboardPage("trial.html" if dry_run else "done.html", title, context)


def _parse_arguments(name: str, form: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """Return the daemon's command for an action, and its arguments."""
    if name == "revert":
        if not form.get("fact"):
            raise BadRequest("no fact was named", hint="choose one in Facts")
        return "revert", {"facts": [form["fact"]], "generation": None}
    if name == "go-back":
        number = form.get("generation", "")
        if not (number.isascii() and number.isdecimal() and len(number) < 10):
            raise BadRequest("no generation was named", hint="choose one in Norms")
        return "revert", {"facts": [], "generation": int(number)}
    return name, {}
