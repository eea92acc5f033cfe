"""What people see of events and of the replies to actions."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from kedit_daemon.report.render import LIST_CHARS, figures_text, statement, when
from kedit_daemon.report.worddiff import NEW, OLD, SAME, word_changes
from kedit_daemon.system.sanitize import clean, clip
from memory.db.queries import answer_until

if TYPE_CHECKING:
    import sqlite3

VALUE_CHARS = 200
# Told in lines of their own, or by the line above them.
_TOLD = ("from", "to", "before", "after", "reason", "fact", "figures", "reasons")
# Of an audit's figures what is not judged: for `log --json`, and for those who ask for an audit.
_BESIDE = ("evidence", "costs")
_KIND_COLOURS = {
    **dict.fromkeys(("fact_live-side", "fact_live-weights"), "green"),
    **dict.fromkeys(("fact_failed", "fact_rejected", "record_failed", "file_refused"), "red"),
    **dict.fromkeys(("edit_failed", "flush_refused", "quarantined"), "red"),
    **dict.fromkeys(("fact_reverted", "fact_expired", "paused"), "yellow"),
}
_Styles = Mapping[str, Callable[[str], str]]
# Who cannot tell red from green sees one of them struck out.
_COLOURED: _Styles = {
    SAME: str,
    OLD: lambda text: click.style(text, fg="red", strikethrough=True),
    NEW: lambda text: click.style(text, fg="green"),
}
_MARKED: _Styles = {SAME: str, OLD: "[-{}-]".format, NEW: "{{+{}+}}".format}


@dataclass(frozen=True)
class Told:
    """An event in words: the answers around it, why, what was measured, and what else is known.

    Cleaned, and none longer than a line takes.
    """

    before: str | None
    after: str | None
    why: tuple[str, ...]
    figures: str
    rest: str


def event_told(event: Mapping[str, Any]) -> Told:
    """What the data of an event says."""
    data = event["data"]
    before, after = (
        None if data.get(name) is None else clip(data[name], VALUE_CHARS)
        for name in ("before", "after")
    )
    why = (*_texts(data.get("reason")), *_texts(data.get("reasons")))
    figures = figures_text(judged(data.get("figures") or {}))
    rest = [f"{clean(k)} {_short(v)}" for k, v in data.items() if k not in _TOLD and v is not None]
    if "from" in data and "to" in data:
        rest.insert(0, f"{clean(data['from'])} → {clean(data['to'])}")
    reasons = tuple(clip(one, VALUE_CHARS) for one in why)
    return Told(before, after, reasons, figures, "  ".join(rest))


def answered(conn: "sqlite3.Connection", event: Mapping[str, Any]) -> dict[str, Any]:
    """The event with the answer before it where it only knows the one after, as of a revert."""
    data = event["data"]
    if event["fact_id"] and data.get("after") is not None and data.get("before") is None:
        before = answer_until(conn, event["fact_id"], event["seq"])
        return {**event, "data": {**data, "before": before}}
    return dict(event)


def event_said(event: Mapping[str, Any], said: str | None) -> str | None:
    """The fact that an event is about: the one in its data, else the one that is known."""
    own = event["data"].get("fact")
    return statement(own) if isinstance(own, dict) else said


def event_lines(event: Mapping[str, Any], said: str | None, coloured: bool = True) -> Iterator[str]:
    """One event; `said` is the fact that it is about. What has changed in an answer is shown in
    colours, or, for those who see none, with marks."""
    said, told = event_said(event, said), event_told(event)
    kind = click.style(clean(event["kind"]), fg=_KIND_COLOURS.get(event["kind"]), bold=True)
    head = [f"#{event['seq']}", when(event["at"]), kind]
    if event["fact_id"]:
        head.append(clean(event["fact_id"]))
    if said:
        head.append(clip(said, LIST_CHARS))
    yield "  ".join(head)
    yield from _answer(told.before, told.after, coloured)
    for why in told.why:
        yield f"    why     {why}"
    if told.figures:
        yield f"    figures {told.figures}"
    if told.rest:
        yield f"    {told.rest}"


def judged(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Of an audit's figures those that its verdict is made of."""
    return {name: value for name, value in figures.items() if name not in _BESIDE}


def _answer(before: str | None, after: str | None, coloured: bool) -> Iterator[str]:
    if before is not None and after is not None:
        marked = _COLOURED if coloured else _MARKED
        words = " ".join(marked[sort](text) for sort, text in word_changes(before, after))
        yield f"    answer  {words}{'  (as before)' if before == after else ''}"
    elif before is not None:
        yield f"    before  {before}"
    elif after is not None:
        yield f"    after   {after}"


def answer_lines(reply: Mapping[str, Any], explain: bool) -> Iterator[str]:
    """The answer to a question, with the base model's, and the facts behind it, where asked."""
    answer = clean(reply["answer"], lines=True)
    if "base_answer" in reply:
        yield f"{click.style('edited', fg='green')}  {answer}"
        yield f"base    {clean(reply['base_answer'], lines=True)}"
    else:
        yield answer
    if not explain:
        return
    for fact in reply.get("fired", ()):
        said = clip(statement(fact), LIST_CHARS)
        scores = {name: fact[name] for name in ("score", "margin") if fact.get(name) is not None}
        parts = (clean(fact["fact"]), clean(fact["tier"]), figures_text(scores), said)
        yield f"fired   {'  '.join(part for part in parts if part)}"
    if not reply.get("fired"):
        yield "fired   none: the main weights answered"


def reply_lines(reply: Mapping[str, Any]) -> Iterator[str]:
    """What flush, audit, consolidate or revert has done, or would do."""
    if reply.get("dry_run"):
        yield "dry run: nothing has been changed"
    named, measured = reply_named(reply), reply_measured(reply)
    for fact_id, answer in reply.get("answers", {}).items():
        before, after = (clip(answer.get(key), VALUE_CHARS) for key in ("before", "after"))
        named.append(("answer", f"{clean(fact_id)}  {before} → {after}"))
    for name, value in (*named, *reply_outcome(reply), *measured):
        yield f"{name:<16}  {value}"


def reply_named(reply: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Which facts a reply names, by what becomes of them."""
    found = []
    for name in ("flushed", "failed", "quarantined", "reverted", "restored"):
        if reply.get(name) or (name in reply and name != "quarantined"):
            ids = reply[name]
            found.append((name, f"{len(ids)}  {' '.join(map(clean, ids))}".rstrip()))
    return found


def reply_outcome(reply: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reply says of the whole, and why."""
    names = ("verdict", "acted", "would", "changed", "facts", "generation", "weights_hash")
    found = [
        (_label(name), _short(reply[name]))
        for name in (*names, "seconds")
        if reply.get(name) is not None
    ]
    return [*found, *(("why", clean(reason)) for reason in _texts(reply.get("reasons")))]


def reply_measured(reply: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures in a reply."""
    figures = dict(reply.get("figures") or {})
    evidence, costs = (figures.pop(name, {}) for name in _BESIDE)
    shown = {**figures, **evidence}
    found = [(_label(name), figures_text({"": value}).strip()) for name, value in shown.items()]
    return [*found, *((_label(f"{part} took"), f"{s:.2f} s") for part, s in costs.items())]


def _texts(value: object) -> list[object]:
    """One reason or several, as the event or the reply has them."""
    return value if isinstance(value, list) else [value] if value else []


def _label(name: str) -> str:
    return clean(name).replace("_", " ")


def _short(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return clip(value if isinstance(value, str) else json.dumps(value), VALUE_CHARS)
