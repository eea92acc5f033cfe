"""What people see of events and of the replies to actions."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import click

from kedit_daemon.text import clean, clip
from kedit_daemon.views import LIST_CHARS, figures_text, statement, when
from kedit_daemon.worddiff import NEW, OLD, SAME, word_changes

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


def event_lines(event: Mapping[str, Any], said: str | None, coloured: bool = True) -> Iterator[str]:
    """One event; `said` is the fact that it is about. What has changed in an answer is shown in
    colours, or, for those who see none, with marks."""
    data = event["data"]
    if isinstance(data.get("fact"), dict):
        said = statement(data["fact"])
    kind = click.style(clean(event["kind"]), fg=_KIND_COLOURS.get(event["kind"]), bold=True)
    head = [f"#{event['seq']}", when(event["at"]), kind]
    if event["fact_id"]:
        head.append(clean(event["fact_id"]))
    if said:
        head.append(clip(said, LIST_CHARS))
    yield "  ".join(head)
    yield from _answer(data.get("before"), data.get("after"), coloured)
    for why in (*_texts(data.get("reason")), *_texts(data.get("reasons"))):
        yield f"    why     {clip(why, VALUE_CHARS)}"
    if data.get("figures"):
        yield f"    figures {figures_text(judged(data['figures']))}"
    rest = [f"{clean(k)} {_short(v)}" for k, v in data.items() if k not in _TOLD and v is not None]
    if "from" in data and "to" in data:
        rest.insert(0, f"{clean(data['from'])} → {clean(data['to'])}")
    if rest:
        yield f"    {'  '.join(rest)}"


def judged(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Of an audit's figures those that its verdict is made of."""
    return {name: value for name, value in figures.items() if name not in _BESIDE}


def _answer(before: object, after: object, coloured: bool) -> Iterator[str]:
    if before is not None and after is not None:
        clipped = clip(before, VALUE_CHARS), clip(after, VALUE_CHARS)
        marked = _COLOURED if coloured else _MARKED
        words = " ".join(marked[sort](text) for sort, text in word_changes(*clipped))
        yield f"    answer  {words}{'  (as before)' if before == after else ''}"
    elif before is not None:
        yield f"    before  {clip(before, VALUE_CHARS)}"
    elif after is not None:
        yield f"    after   {clip(after, VALUE_CHARS)}"


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
    for name in ("flushed", "failed", "quarantined", "reverted", "restored"):
        if reply.get(name) or (name in reply and name != "quarantined"):
            ids = reply[name]
            yield _line(name, f"{len(ids)}  {' '.join(map(clean, ids))}".rstrip())
    for fact_id, answer in reply.get("answers", {}).items():
        before, after = (clip(answer.get(key), VALUE_CHARS) for key in ("before", "after"))
        yield _line("answer", f"{clean(fact_id)}  {before} → {after}")
    for name in (
        "verdict",
        "acted",
        "would",
        "changed",
        "facts",
        "generation",
        "weights_hash",
        "seconds",
    ):
        if reply.get(name) is not None:
            yield _line(name, _short(reply[name]))
    for reason in _texts(reply.get("reasons")):
        yield _line("why", clean(reason))
    figures = dict(reply.get("figures") or {})
    evidence, costs = (figures.pop(name, {}) for name in _BESIDE)
    for name, value in {**figures, **evidence}.items():
        yield _line(name, figures_text({"": value}).strip())
    for part, seconds in costs.items():
        yield _line(f"{part} took", f"{seconds:.2f} s")


def _texts(value: object) -> list[object]:
    """One reason or several, as the event or the reply has them."""
    return value if isinstance(value, list) else [value] if value else []


def _line(name: str, value: str) -> str:
    return f"{clean(name).replace('_', ' '):<16}  {value}"


def _short(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return clip(value if isinstance(value, str) else json.dumps(value), VALUE_CHARS)
