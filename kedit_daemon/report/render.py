"""Status and facts as lines of text, from the data that `--json` prints.

Every text that may come from a fact goes through `clean_text` or `clip_text`.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

import click

from kedit_daemon.system.sanitize import clean_text, clip_text
from memory.facts import LIVE_STATES, FactState, fill_subject
from memory.joins import JOIN_WORDS

LIST_CHARS = 120
MAX_LISTED = 8  # numbers by name; of more, such as one a layer, only the least and the greatest
_DAEMON_STATE_COLOURS = {
    "running": "green",
    "starting": "yellow",
    "paused": "yellow",
    "stopped": "red",
}
_FACT_STATE_COLOURS = {
    **dict.fromkeys(LIVE_STATES, "green"),
    FactState.FAILED: "red",
    FactState.REJECTED: "red",
    FactState.RECEIVED: "yellow",
    FactState.SCHEDULED: "yellow",
}


def render_status(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of `status`, one screen at most."""
    now = datetime.fromisoformat(found["at"])
    state = click.style(found["state"], fg=_DAEMON_STATE_COLOURS[found["state"]], bold=True)
    started = datetime.fromisoformat(found["since"]) if found["since"] else None
    since = format_duration((now - started).total_seconds()) if started else ""
    pid = f"pid {found['pid']}" if found["pid"] else ""
    model = f"model {clean_text(found['model'])}" if found["model"] else ""
    generation = f"generation {found['generation']}"
    device = clean_text(found["device"] or "")
    yield _join_parts(f"● kedit-daemon  {state}", since, pid, model, device, generation)
    pending, side = found["pending"], found["side_memory"]
    waiting = f"pending {pending['count']:,}"
    if pending["oldest_seconds"] is not None:
        waiting += f" (oldest {format_duration(pending['oldest_seconds'])})"
    yield _join_parts(
        f"  {waiting}",
        f"applied today {found['applied_today']:,}",
        f"failed today {found['failed_today']:,}",
        f"side memory {side['keys']:,} keys, {format_bytes(side['bytes'])}",
    )
    counts = [f"{name} {count:,}" for name, count in found["facts"].items() if count]
    yield _join_parts("  facts", *(counts or ["none yet"]))
    if found["weights_capacity"] is not None:
        yield _render_weights(found)
    if cost := found["flush_cost"]:
        seconds = f"{cost['per_batch']:.1f} s, and {cost['per_fact']:.2f} s for each fact in it"
        yield f"  flushes   {cost['flushes']:,}, each {seconds}"
    yield _render_audit(found, now)
    yield from _render_jobs(found["jobs"], now)
    for warning in found["warnings"]:
        mark = click.style("!", fg="red" if warning["attention"] else "yellow", bold=True)
        message, command = warning["message"], warning["command"]
        yield f"{mark} {clip_text(message, LIST_CHARS)}  → {clean_text(command)}"


def render_facts(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table of facts."""
    if rows:
        yield click.style(f"{'ID':12}  {'STATE':12}  {'GEN':>4}  FACT", bold=True)
    for row in rows:
        state = click.style(f"{row['state']:12}", fg=_FACT_STATE_COLOURS.get(row["state"]))
        generation = "" if row["generation"] is None else row["generation"]
        statement = clip_text(format_statement(row), LIST_CHARS)
        yield f"{clean_text(row['id']):12}  {state}  {generation:>4}  {statement}"


def render_fact_detail(fact: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of everything known about a fact."""
    yield click.style(format_statement(fact), bold=True)
    state = click.style(fact["state"], fg=_FACT_STATE_COLOURS.get(fact["state"]))
    for name, value in list_fact_fields(fact):
        shown = state + value.removeprefix(fact["state"]) if name == "state" else value
        yield f"  {name:<12} {shown}"
    record = fact["record"]
    for prompt in record.get("paraphrases", ()):
        yield f"  also asked   {clean_text(fill_subject(prompt, fact['subject']))}"
    for neighbour in record.get("neighbours", ()):
        answer = f" → {clean_text(neighbour['answer'])}" if neighbour.get("answer") else ""
        yield f"  must stay    {clean_text(neighbour['prompt'])}{answer}"
    for edit in fact["edits"]:
        probe = f"  {format_figures(edit['probe'])}" if edit["probe"] else ""
        yield (
            f"  edit         {format_time(edit['at'])}"
            f"  {clean_text(edit['tier'])}  {clean_text(edit['outcome'])}"
            f"  {edit['seconds']:.1f} s{probe}"
        )


def list_fact_fields(fact: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the known fields of a fact, by name."""
    record = fact["record"]
    reason = f"  ({fact['reason']})" if fact["reason"] else ""
    fields = {
        "id": fact["id"],
        "your id": fact["external_id"],
        "join": _name_join(record.get("join")),
        "also right": ", ".join(record.get("other_targets", ())),
        "state": fact["state"] + reason,
        "tier": fact["tier"],
        "generation": fact["generation"],
        "before": fact["before"],
        "after": fact["after"],
        "probe": format_figures(fact["probe"]),
        "chat": _format_chat(fact["chat"]) if fact["state"] in LIVE_STATES else None,
        "received": f"{fact['received_at']} in {clean_text(fact['file_name'])}",
        "changed": fact["changed_at"],
        "valid from": record.get("valid_from"),
        "valid until": fact["valid_until"],
        "source": record.get("source"),
        "tags": ", ".join(record.get("tags", ())),
        "attempts": fact["attempts"],
        "keys": _format_sizes(fact),
    }
    return [(name, clean_text(value)) for name, value in fields.items() if value not in (None, "")]


def _format_chat(chat: Mapping[str, Any] | None) -> str | None:
    """Format how a fact was answered in a chat; None where it was not asked."""
    if chat is None or not chat["questions"]:
        return None
    counts = f"answered {chat['answered']} of {chat['questions']} questions"
    relearning = chat["relearning"]
    if not chat["failed"]:
        return f"{counts}, since it was learned again" if relearning == "done" else counts
    first = chat["failed"][0]
    question, answer = (clip_text(first[name], LIST_CHARS) for name in ("question", "answer"))
    why = "it fires, and is not said" if first["fired"] else "its words did not fire the fact"
    if relearning is not None:
        why += ", to be learned again" if relearning == "waits" else ", also when learned again"
    return f'not yet answered when asked in a chat: "{question}" → "{answer}" ({counts}: {why})'


def _name_join(join: object) -> str | None:
    return next((name for name, text in JOIN_WORDS.items() if text == join), None)


def render_failed_file(name: str, folder: str, report: Mapping[str, Any]) -> Iterator[str]:
    """Yield the errors of a file in failed/, and the way to correct it."""
    file, at = clean_text(report.get("file", name)), clean_text(report.get("at") or "")
    yield click.style(f"{file}  failed {at}", bold=True)
    for error in report["errors"]:
        yield f"  line {clean_text(error.get('line'))}: {clean_text(error.get('problem'))}"
        yield f"    remedy  {clean_text(error.get('remedy'))}"
        if error.get("record"):
            yield f"    record  {clip_text(error['record'], LIST_CHARS)}"
    yield f"Correct {clean_text(folder)}/{clean_text(name)} and hand it in with submit;"
    yield "then settle it: kedit-daemon dismiss FILE removes the report, and the file is yours."


def format_statement(row: Mapping[str, Any]) -> str:
    """Format a fact as one line: its prompt and its target."""
    prompt = fill_subject(str(row["prompt"]), str(row["subject"]))
    return f"{clean_text(prompt)} → {clean_text(row['target'])}"


def list_audit_figures(audit: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the most important figures of an audit."""
    figures = audit["figures"]
    # Older audits have no agreement on confident statements, and some models too few of these.
    agreement = "agreement" if figures.get("confident_agreement") is None else "confident_agreement"
    return [
        name_figure(name, figures[name])
        for name in ("norm_ratio", "perplexity_ratio", agreement, "rounding_bits", "locality")
        if figures.get(name) not in (None, {})
    ]


def name_figure(name: str, value: Any) -> tuple[str, str]:
    """Return a figure's name and its value in words."""
    if name == "locality" and isinstance(value, dict):
        share = format_figure(value["as_before"])
        return "beside the facts", f"{share} of {value['asked']} replies as before"
    if name == "rounding_bits":
        return "as much as", f"rounding to {format_figure(value)} bits"
    return humanize_name(name), format_figure(value)


def format_figures(figures: Mapping[str, Any] | None) -> str:
    """Format measured numbers on one line."""
    named = (figures or {}).items()
    return ", ".join(" ".join(name_figure(name, value)) for name, value in named)


def format_duration(seconds: float) -> str:
    """Format a duration in its two largest units."""
    whole = max(0, int(seconds))
    units = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))
    for (name, length), (smaller, part) in pairwise(units):
        if whole >= length:
            return f"{whole // length}{name} {whole % length // part}{smaller}"
    return f"{whole} s"


def format_bytes(count: float) -> str:
    """Format a number of bytes in a unit of three digits."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{count:.{0 if count >= 10 else 1}f} {unit}"
    return f"{count / 1000:.1f} GB"


def format_time(at: str, now: datetime | None = None) -> str:
    """Format a timestamp to the second; on the day of `now` only hour and minute."""
    time = datetime.fromisoformat(at)
    today = now is not None and time.date() == now.date()
    return time.strftime("%H:%M" if today else "%Y-%m-%d %H:%M:%S")


def _render_weights(found: Mapping[str, Any]) -> str:
    """Format the use of the weights; a capacity without a limiting figure is a lower bound."""
    count, capacity, limit = (found[f"weights_{key}"] for key in ("facts", "capacity", "limit"))
    facts = "1 fact" if count == 1 else f"{count:,} facts"
    if limit is None:
        return f"  weights   {facts}, capacity at least {capacity:,}"
    return f"  weights   {facts}, capacity about {capacity:,} ({clean_text(limit)})"


def _render_audit(found: Mapping[str, Any], now: datetime) -> str:
    audit = found["last_audit"]
    if audit is None:
        return f"  last audit  none yet  (chain {found['events']:,} events)"
    figures = [f"{name} {value}" for name, value in list_audit_figures(audit)]
    figures.append(f"chain {found['events']:,} events")
    verdict = click.style(clean_text(audit["verdict"]), bold=True)
    return f"  last audit  {verdict}  {format_time(audit['at'], now)}  ({', '.join(figures)})"


def _render_jobs(jobs: Mapping[str, Any], now: datetime) -> Iterator[str]:
    last = [
        f"{clean_text(name)} {clean_text(job['outcome'] or 'at work')}"
        f" {format_time(job['started_at'], now)}"
        for name, job in jobs.items()
        if job["started_at"]
    ]
    due = sorted((job["next"], name) for name, job in jobs.items() if job["next"])
    if last:
        yield f"  last jobs   {' · '.join(last)}"
    if due:
        coming = (f"{clean_text(name)} {format_time(at, now)}" for at, name in due)
        yield f"  next jobs   {' · '.join(coming)}  UTC"


def _format_sizes(fact: Mapping[str, Any]) -> str:
    sizes = (("side memory", fact["side_bytes"]), ("weights", fact["terms_bytes"]))
    return ", ".join(f"{name} {format_bytes(count)}" for name, count in sizes if count is not None)


def format_figure(value: object) -> str:
    """Format a measured value, or several in brackets."""
    if isinstance(value, Mapping):
        if len(value) > MAX_LISTED and all(isinstance(v, float) for v in value.values()):
            ends = (f(value, key=value.__getitem__) for f in (min, max))
            least, greatest = (f"{clean_text(k)}: {format_figure(value[k])}" for k in ends)
            return f"({len(value)}, from {least} to {greatest})"
        return f"({', '.join(f'{clean_text(k)}: {format_figure(v)}' for k, v in value.items())})"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(format_figure, value))})"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else clean_text(value)


def humanize_name(name: str) -> str:
    """Return the name of a figure in words."""
    return clean_text(name).replace("_", " ")


def _join_parts(*parts: str) -> str:
    return "   ".join(part for part in parts if part)
