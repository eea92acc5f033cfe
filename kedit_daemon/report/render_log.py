"""Events, and the replies to actions, as lines of text."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from kedit_daemon.report.render import (
    LIST_CHARS,
    format_figures,
    format_statement,
    format_time,
    humanize_name,
    name_figure,
)
from kedit_daemon.report.worddiff import NEW, OLD, SAME, diff_words
from kedit_daemon.system.sanitize import clean_text, clip_text
from memory.db.queries import find_answer_before

if TYPE_CHECKING:
    import sqlite3

VALUE_CHARS = 200
# Shown in lines of their own, or in the first line.
_OMITTED_KEYS = ("from", "to", "before", "after", "reason", "fact", "figures", "reasons", "changes")
# Figures of an audit that its verdict does not depend on: for `log --json`, and for `audit`.
_UNJUDGED_KEYS = ("evidence", "costs")
_KIND_COLOURS = {
    **dict.fromkeys(("fact_live-side", "fact_live-weights"), "green"),
    **dict.fromkeys(("fact_failed", "fact_rejected", "record_failed", "file_refused"), "red"),
    **dict.fromkeys(("edit_failed", "flush_refused", "quarantined"), "red"),
    **dict.fromkeys(("fact_reverted", "fact_expired", "paused"), "yellow"),
}
_Styles = Mapping[str, Callable[[str], str]]
# Struck out, for readers who cannot tell red from green.
_COLOUR_STYLES: _Styles = {
    SAME: str,
    OLD: lambda text: click.style(text, fg="red", strikethrough=True),
    NEW: lambda text: click.style(text, fg="green"),
}
_MARK_STYLES: _Styles = {SAME: str, OLD: "[-{}-]".format, NEW: "{{+{}+}}".format}


@dataclass(frozen=True)
class EventText:
    """An event in words: the answers around it, its reasons, its figures, and other data.

    All text is cleaned, and short enough for a line.
    """

    before: str | None
    after: str | None
    why: tuple[str, ...]
    figures: str
    rest: str


def describe_event(event: Mapping[str, Any]) -> EventText:
    """Put the data of an event into words."""
    data = event["data"]
    before, after = (
        None if data.get(name) is None else clip_text(data[name], VALUE_CHARS)
        for name in ("before", "after")
    )
    figures = format_figures(select_judged_figures(data.get("figures") or {}))
    rest = [
        f"{clean_text(k)} {_format_value(v)}"
        for k, v in data.items()
        if k not in _OMITTED_KEYS and v is not None
    ]
    for name, change in (data.get("changes") or {}).items():
        before_and_after = (_format_value(change[key]) for key in ("before", "after"))
        rest.append(f"{humanize_name(name)} {' → '.join(before_and_after)}")
    if "from" in data and "to" in data:
        rest.insert(0, f"{clean_text(data['from'])} → {clean_text(data['to'])}")
    reasons = tuple(clip_text(reason, VALUE_CHARS) for reason in list_reasons(data))
    return EventText(before, after, reasons, figures, "  ".join(rest))


def add_prior_answer(conn: "sqlite3.Connection", event: Mapping[str, Any]) -> dict[str, Any]:
    """Return the event with the answer before it, where it has only the one after (a revert)."""
    data = event["data"]
    if event["fact_id"] and data.get("after") is not None and data.get("before") is None:
        before = find_answer_before(conn, event["fact_id"], event["seq"])
        return {**event, "data": {**data, "before": before}}
    return dict(event)


def find_event_statement(event: Mapping[str, Any], statement: str | None) -> str | None:
    """Return the statement of the fact in the event's data, else the one given."""
    fact = event["data"].get("fact")
    return format_statement(fact) if isinstance(fact, dict) else statement


def render_event(
    event: Mapping[str, Any], statement: str | None, coloured: bool = True
) -> Iterator[str]:
    """Yield the lines of an event about a fact with this statement.

    Changes of an answer are shown in colours, or else with marks.
    """
    statement, text = find_event_statement(event, statement), describe_event(event)
    kind = click.style(clean_text(event["kind"]), fg=_KIND_COLOURS.get(event["kind"]), bold=True)
    head = [f"#{event['seq']}", format_time(event["at"]), kind]
    if event["fact_id"]:
        head.append(clean_text(event["fact_id"]))
    if statement:
        head.append(clip_text(statement, LIST_CHARS))
    yield "  ".join(head)
    yield from _render_change(text.before, text.after, coloured)
    for why in text.why:
        yield f"    why     {why}"
    if text.figures:
        yield f"    figures {text.figures}"
    if text.rest:
        yield f"    {text.rest}"


def select_judged_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of an audit that its verdict depends on."""
    return {name: value for name, value in figures.items() if name not in _UNJUDGED_KEYS}


def _render_change(before: str | None, after: str | None, coloured: bool) -> Iterator[str]:
    if before is not None and after is not None:
        marked = _COLOUR_STYLES if coloured else _MARK_STYLES
        words = " ".join(marked[sort](text) for sort, text in diff_words(before, after))
        yield f"    answer  {words}{'  (as before)' if before == after else ''}"
    elif before is not None:
        yield f"    before  {before}"
    elif after is not None:
        yield f"    after   {after}"


def render_reply(reply: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines that say what flush, audit, consolidate or revert has done or would do."""
    if reply.get("dry_run"):
        yield "dry run: nothing has been changed"
    named, measured = list_named_facts(reply), list_measured_figures(reply)
    for fact_id, answer in reply.get("answers", {}).items():
        before, after = (clip_text(answer.get(key), VALUE_CHARS) for key in ("before", "after"))
        named.append(("answer", f"{clean_text(fact_id)}  {before} → {after}"))
    for name, value in (*named, *list_outcome(reply), *measured):
        yield f"{name:<16}  {value}"


def list_named_facts(reply: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the ids of the facts in a reply, by outcome."""
    return [
        (name, f"{len(reply[name])}  {' '.join(map(clean_text, reply[name]))}".rstrip())
        for name in ("flushed", "kept", "failed", "quarantined", "reverted", "restored")
        if reply.get(name) or (name in reply and name != "quarantined")
    ]


def list_outcome(reply: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the outcome as a whole, and its reasons."""
    names = ("verdict", "acted", "would", "changed", "facts", "generation", "weights_hash")
    outcome = [
        (humanize_name(name), _format_value(reply[name]))
        for name in (*names, "seconds")
        if reply.get(name) is not None
    ]
    return [*outcome, *(("why", clean_text(reason)) for reason in list_reasons(reply))]


def list_measured_figures(reply: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the figures in a reply, and the seconds that each took."""
    figures = dict(reply.get("figures") or {})
    evidence, costs = (figures.pop(name, {}) for name in _UNJUDGED_KEYS)
    shown = [name_figure(name, value) for name, value in (figures | evidence).items()]
    took = [(f"{clean_text(part)} took", f"{seconds:.2f} s") for part, seconds in costs.items()]
    return [*shown, *took]


def list_reasons(data: Mapping[str, Any]) -> list[object]:
    """Return the reasons of an event or a reply, of which it has one or several."""
    reasons = data.get("reasons")
    listed = reasons if isinstance(reasons, list) else [reasons]
    return [reason for reason in (data.get("reason"), *listed) if reason]


def _format_value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return clip_text(value if isinstance(value, str) else json.dumps(value), VALUE_CHARS)
