"""What people may have done: each is tried first, and done when its figures have been seen.

The daemon does it, asked over its socket: nothing here writes.
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
    "failed": "Not held",
    "quarantined": "Into quarantine",
    "reverted": "Taken out",
    "restored": "Live again",
    "learned_anew": "Learned anew",
}


@dataclass(frozen=True)
class DashboardAction:
    """Something that the daemon does when it is asked, in words."""

    title: str
    button: str
    about: str
    grave: bool = False


ACTIONS = {
    "audit": DashboardAction(
        "Audit",
        "Audit now",
        "The health of the weights is measured, judged and written down, and what the verdict"
        " asks for is done.",
    ),
    "flush": DashboardAction(
        "Flush",
        "Flush now",
        "Facts that wait, and those beside the weights, are moved into the weights.",
    ),
    "consolidate": DashboardAction(
        "Consolidate",
        "Consolidate now",
        "The weights are solved anew over all live facts. It is taken if nothing gets worse.",
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
    """Two for each action: its trial, and the action itself. Both want a form of ours."""
    routes = []
    for name, action in ACTIONS.items():
        for path, dry_run in ((f"/actions/{name}/try", True), (f"/actions/{name}", False)):
            handler = partial(_run_action, home, name, action, dry_run)
            routes.append(shell.page_route(path, handler, "POST"))
    return routes


def _run_action(
    home: Home, name: str, action: DashboardAction, dry_run: bool, asked: PageRequest
) -> DashboardPage:
    command, given = _parse_arguments(name, asked.form)
    reply = send_request(home.socket_file, command, {**given, "dry_run": dry_run})
    answers = reply.get("answers", {})
    ids = {key: reply[key] for key in _GROUP_TITLES if reply.get(key)}
    with open_database(home) as conn:
        rows = fetch_facts_by_id(
            conn, {*answers, *(one for group in ids.values() for one in group)}
        )
    known = {row["id"]: row for row in rows}
    shown = {
        "name": name,
        "action": action,
        "asked": asked.form,
        "groups": {
            _GROUP_TITLES[k]: [known[n] for n in group if n in known] for k, group in ids.items()
        },
        "answers": [(known[n], said) for n, said in answers.items() if n in known],
        "outcome": list_outcome(reply),
        "measured": list_measured_figures(reply),
        "verdict": reply.get("verdict"),
        "something": reply["taken"] if "taken" in reply else bool(ids) or name == "audit",
    }
    title = f"{action.title}: what would happen" if dry_run else f"{action.title}: done"
    return DashboardPage("trial.html" if dry_run else "done.html", title, shown)


def _parse_arguments(name: str, form: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """The daemon's command behind an action, and what it is given."""
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
