"""What people see of events and of the replies to actions."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from kedit_daemon.report.render import LIST_CHARS, format_figures, format_statement, format_time
from kedit_daemon.report.worddiff import NEW, OLD, SAME, diff_words
from kedit_daemon.system.sanitize import clean_text, clip_text
from memory.db.queries import find_answer_before

if TYPE_CHECKING:
    import sqlite3

VALUE_CHARS = 200
# Told in lines of their own, or by the line above them.
_OMITTED_KEYS = ("from", "to", "before", "after", "reason", "fact", "figures", "reasons")
# Of an audit's figures what is not judged: for `log --json`, and for those who ask for an audit.
_UNJUDGED_KEYS = ("evidence", "costs")
_KIND_COLOURS = {
    **dict.fromkeys(("fact_live-side", "fact_live-weights"), "green"),
    **dict.fromkeys(("fact_failed", "fact_rejected", "record_failed", "file_refused"), "red"),
    **dict.fromkeys(("edit_failed", "flush_refused", "quarantined"), "red"),
    **dict.fromkeys(("fact_reverted", "fact_expired", "paused"), "yellow"),
}
_Styles = Mapping[str, Callable[[str], str]]
# Who cannot tell red from green sees one of them struck out.
_COLOUR_STYLES: _Styles = {
    SAME: str,
    OLD: lambda text: click.style(text, fg="red", strikethrough=True),
    NEW: lambda text: click.style(text, fg="green"),
}
_MARK_STYLES: _Styles = {SAME: str, OLD: "[-{}-]".format, NEW: "{{+{}+}}".format}


@dataclass(frozen=True)
class EventText:
    """An event in words: the answers around it, why, what was measured, and what else is known.

    Cleaned, and none longer than a line takes.
    """

    before: str | None
    after: str | None
    why: tuple[str, ...]
    figures: str
    rest: str


def describe_event(event: Mapping[str, Any]) -> EventText:
    """What the data of an event says."""
    data = event["data"]
    before, after = (
        None if data.get(name) is None else clip_text(data[name], VALUE_CHARS)
        for name in ("before", "after")
    )
    why = (*_as_list(data.get("reason")), *_as_list(data.get("reasons")))
    figures = format_figures(select_judged_figures(data.get("figures") or {}))
    rest = [
        f"{clean_text(k)} {_format_value(v)}"
        for k, v in data.items()
        if k not in _OMITTED_KEYS and v is not None
    ]
    if "from" in data and "to" in data:
        rest.insert(0, f"{clean_text(data['from'])} → {clean_text(data['to'])}")
    reasons = tuple(clip_text(one, VALUE_CHARS) for one in why)
    return EventText(before, after, reasons, figures, "  ".join(rest))


def add_prior_answer(conn: "sqlite3.Connection", event: Mapping[str, Any]) -> dict[str, Any]:
    """The event with the answer before it where it only knows the one after, as of a revert."""
    data = event["data"]
    if event["fact_id"] and data.get("after") is not None and data.get("before") is None:
        before = find_answer_before(conn, event["fact_id"], event["seq"])
        return {**event, "data": {**data, "before": before}}
    return dict(event)


def find_event_statement(event: Mapping[str, Any], said: str | None) -> str | None:
    """The fact that an event is about: the one in its data, else the one that is known."""
    own = event["data"].get("fact")
    return format_statement(own) if isinstance(own, dict) else said


def render_event(
    event: Mapping[str, Any], said: str | None, coloured: bool = True
) -> Iterator[str]:
    """One event; `said` is the fact that it is about. What has changed in an answer is shown in
    colours, or, for those who see none, with marks."""
    said, told = find_event_statement(event, said), describe_event(event)
    kind = click.style(clean_text(event["kind"]), fg=_KIND_COLOURS.get(event["kind"]), bold=True)
    head = [f"#{event['seq']}", format_time(event["at"]), kind]
    if event["fact_id"]:
        head.append(clean_text(event["fact_id"]))
    if said:
        head.append(clip_text(said, LIST_CHARS))
    yield "  ".join(head)
    yield from _render_change(told.before, told.after, coloured)
    for why in told.why:
        yield f"    why     {why}"
    if told.figures:
        yield f"    figures {told.figures}"
    if told.rest:
        yield f"    {told.rest}"


def select_judged_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Of an audit's figures those that its verdict is made of."""
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


def render_answer(reply: Mapping[str, Any], explain: bool) -> Iterator[str]:
    """The answer to a question, with the base model's, and the facts behind it, where asked."""
    answer = clean_text(reply["answer"], lines=True)
    if "base_answer" in reply:
        yield f"{click.style('edited', fg='green')}  {answer}"
        yield f"base    {clean_text(reply['base_answer'], lines=True)}"
    else:
        yield answer
    if not explain:
        return
    for fact in reply.get("fired", ()):
        said = clip_text(format_statement(fact), LIST_CHARS)
        scores = {name: fact[name] for name in ("score", "margin") if fact.get(name) is not None}
        parts = (clean_text(fact["fact"]), clean_text(fact["tier"]), format_figures(scores), said)
        yield f"fired   {'  '.join(part for part in parts if part)}"
    if not reply.get("fired"):
        yield "fired   none: the main weights answered"


def render_reply(reply: Mapping[str, Any]) -> Iterator[str]:
    """What flush, audit, consolidate or revert has done, or would do."""
    if reply.get("dry_run"):
        yield "dry run: nothing has been changed"
    named, measured = list_named_facts(reply), list_measured_figures(reply)
    for fact_id, answer in reply.get("answers", {}).items():
        before, after = (clip_text(answer.get(key), VALUE_CHARS) for key in ("before", "after"))
        named.append(("answer", f"{clean_text(fact_id)}  {before} → {after}"))
    for name, value in (*named, *list_outcome(reply), *measured):
        yield f"{name:<16}  {value}"


def list_named_facts(reply: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Which facts a reply names, by what becomes of them."""
    found = []
    for name in ("flushed", "failed", "quarantined", "reverted", "restored"):
        if reply.get(name) or (name in reply and name != "quarantined"):
            ids = reply[name]
            found.append((name, f"{len(ids)}  {' '.join(map(clean_text, ids))}".rstrip()))
    return found


def list_outcome(reply: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reply says of the whole, and why."""
    names = ("verdict", "acted", "would", "changed", "facts", "generation", "weights_hash")
    found = [
        (_format_label(name), _format_value(reply[name]))
        for name in (*names, "seconds")
        if reply.get(name) is not None
    ]
    return [*found, *(("why", clean_text(reason)) for reason in _as_list(reply.get("reasons")))]


def list_measured_figures(reply: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures in a reply."""
    figures = dict(reply.get("figures") or {})
    evidence, costs = (figures.pop(name, {}) for name in _UNJUDGED_KEYS)
    shown = {**figures, **evidence}
    found = [
        (_format_label(name), format_figures({"": value}).strip()) for name, value in shown.items()
    ]
    return [*found, *((_format_label(f"{part} took"), f"{s:.2f} s") for part, s in costs.items())]


def _as_list(value: object) -> list[object]:
    """One reason or several, as the event or the reply has them."""
    return value if isinstance(value, list) else [value] if value else []


def _format_label(name: str) -> str:
    return clean_text(name).replace("_", " ")


def _format_value(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return clip_text(value if isinstance(value, str) else json.dumps(value), VALUE_CHARS)
