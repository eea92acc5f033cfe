"""What people see of the situation and of facts: lines from the data that `--json` prints.

Every text that may come from a fact goes through `clean` or `clip`.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

import click

from kedit_daemon.system.sanitize import clean_text, clip_text
from memory.facts import LIVE_STATES, FactState, fill_subject

LIST_CHARS = 120
MAX_LISTED = 8  # numbers by name; of more, as of every layer of a model, the least and the greatest
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
}


def render_status(found: Mapping[str, Any]) -> Iterator[str]:
    """One screen."""
    now = datetime.fromisoformat(found["at"])
    state = click.style(found["state"], fg=_DAEMON_STATE_COLOURS[found["state"]], bold=True)
    since = (
        format_duration((now - _parse_time(found["since"])).total_seconds())
        if found["since"]
        else ""
    )
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
        each = f"{cost['per_batch']:.1f} s, and {cost['per_fact']:.2f} s for each fact in it"
        yield f"  flushes   {cost['flushes']:,}, each {each}"
    yield _render_audit(found, now)
    yield from _render_jobs(found["jobs"], now)
    for warning in found["warnings"]:
        mark = click.style("!", fg="red" if warning["attention"] else "yellow", bold=True)
        message, command = warning["message"], warning["command"]
        yield f"{mark} {clip_text(message, LIST_CHARS)}  → {clean_text(command)}"


def render_facts(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A table of facts."""
    if rows:
        yield click.style(f"{'ID':12}  {'STATE':12}  {'GEN':>4}  FACT", bold=True)
    for row in rows:
        state = click.style(f"{row['state']:12}", fg=_FACT_STATE_COLOURS.get(row["state"]))
        generation = "" if row["generation"] is None else row["generation"]
        said = clip_text(format_statement(row), LIST_CHARS)
        yield f"{clean_text(row['id']):12}  {state}  {generation:>4}  {said}"


def render_fact_detail(fact: Mapping[str, Any]) -> Iterator[str]:
    """One fact with everything that is known of it."""
    yield click.style(format_statement(fact), bold=True)
    state = click.style(fact["state"], fg=_FACT_STATE_COLOURS.get(fact["state"]))
    for name, value in list_fact_fields(fact):
        shown = state + value.removeprefix(fact["state"]) if name == "state" else value
        yield f"  {name:<12} {shown}"
    record = fact["record"]
    for prompt in record.get("paraphrases", ()):
        yield f"  also asked   {clean_text(fill_subject(prompt, fact['subject']))}"
    for near in record.get("neighbours", ()):
        answer = f" → {clean_text(near['answer'])}" if near.get("answer") else ""
        yield f"  must stay    {clean_text(near['prompt'])}{answer}"
    for edit in fact["edits"]:
        probe = f"  {format_figures(edit['probe'])}" if edit["probe"] else ""
        yield (
            f"  edit         {format_time(edit['at'])}"
            f"  {clean_text(edit['tier'])}  {clean_text(edit['outcome'])}"
            f"  {edit['seconds']:.1f} s{probe}"
        )


def list_fact_fields(fact: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What is known of a fact, by name; what is not known is left out."""
    record = fact["record"]
    reason = f"  ({fact['reason']})" if fact["reason"] else ""
    known = {
        "id": fact["id"],
        "your id": fact["external_id"],
        "state": fact["state"] + reason,
        "tier": fact["tier"],
        "generation": fact["generation"],
        "before": fact["before"],
        "after": fact["after"],
        "probe": format_figures(fact["probe"]),
        "received": f"{fact['received_at']} in {clean_text(fact['file_name'])}",
        "changed": fact["changed_at"],
        "valid from": record.get("valid_from"),
        "valid until": fact["valid_until"],
        "source": record.get("source"),
        "tags": ", ".join(record.get("tags", ())),
        "attempts": fact["attempts"],
        "keys": _format_sizes(fact),
    }
    return [(name, clean_text(value)) for name, value in known.items() if value not in (None, "")]


def render_failed_file(name: str, folder: str, report: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a file in failed/, and how to go on."""
    file, at = clean_text(report.get("file", name)), clean_text(report.get("at") or "")
    yield click.style(f"{file}  failed {at}", bold=True)
    for error in report["errors"]:
        yield f"  line {clean_text(error.get('line'))}: {clean_text(error.get('problem'))}"
        yield f"    remedy  {clean_text(error.get('remedy'))}"
        if error.get("record"):
            yield f"    record  {clip_text(error['record'], LIST_CHARS)}"
    yield f"Correct {clean_text(folder)}/{clean_text(name)} and hand it in with submit;"
    yield f"then remove it, and {clean_text(name)}.error.json beside it."


def format_statement(row: Mapping[str, Any]) -> str:
    """What a fact says, in one line."""
    asked = fill_subject(str(row["prompt"]), str(row["subject"]))
    return f"{clean_text(asked)} → {clean_text(row['target'])}"


def list_audit_figures(audit: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures of an audit that tell most."""
    names = ("norm_ratio", "perplexity_ratio", "agreement")
    figures = audit["figures"]
    return [
        (_humanize_name(name), _format_figure(figures[name]))
        for name in names
        if figures.get(name) not in (None, {})
    ]


def format_figures(figures: Mapping[str, Any] | None) -> str:
    """Measured numbers on one line."""
    if not figures:
        return ""
    return ", ".join(
        f"{_humanize_name(name)} {_format_figure(value)}" for name, value in figures.items()
    )


def format_duration(seconds: float) -> str:
    """A duration in its two largest units."""
    whole = max(0, int(seconds))
    units = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))
    for (name, length), (smaller, part) in pairwise(units):
        if whole >= length:
            return f"{whole // length}{name} {whole % length // part}{smaller}"
    return f"{whole} s"


def format_bytes(count: float) -> str:
    """A number of bytes."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{count:.{0 if count >= 10 else 1}f} {unit}"
    return f"{count / 1000:.1f} GB"


def format_time(at: str, now: datetime | None = None) -> str:
    """A moment to the second; on the day of `now` only the time."""
    moment = _parse_time(at)
    today = now is not None and moment.date() == now.date()
    return moment.strftime("%H:%M" if today else "%Y-%m-%d %H:%M:%S")


def _render_weights(found: Mapping[str, Any]) -> str:
    """A count of facts that no figure limits is only as far as the daemon can foresee."""
    held, most, limit = (found[f"weights_{key}"] for key in ("facts", "capacity", "limit"))
    facts = "1 fact" if held == 1 else f"{held:,} facts"
    if limit is None:
        return f"  weights   {facts} of at least {most:,} they bear"
    return f"  weights   {facts} of about {most:,} they bear ({clean_text(limit)})"


def _render_audit(found: Mapping[str, Any], now: datetime) -> str:
    audit = found["last_audit"]
    if audit is None:
        return f"  last audit  none yet  (chain {found['events']:,} events)"
    told = [f"{name} {value}" for name, value in list_audit_figures(audit)]
    told.append(f"chain {found['events']:,} events")
    verdict = click.style(clean_text(audit["verdict"]), bold=True)
    return f"  last audit  {verdict}  {format_time(audit['at'], now)}  ({', '.join(told)})"


def _render_jobs(jobs: Mapping[str, Any], now: datetime) -> Iterator[str]:
    ran = {name: job for name, job in jobs.items() if job["started_at"]}
    last = [
        f"{clean_text(name)} {clean_text(job['outcome'] or 'at work')}"
        f" {format_time(job['started_at'], now)}"
        for name, job in ran.items()
    ]
    due = sorted((job["next"], name) for name, job in jobs.items() if job["next"])
    coming = [f"{clean_text(name)} {format_time(at, now)}" for at, name in due]
    if last:
        yield f"  last jobs   {' · '.join(last)}"
    if coming:
        yield f"  next jobs   {' · '.join(coming)}  UTC"


def _format_sizes(fact: Mapping[str, Any]) -> str:
    held = (("side memory", fact["side_bytes"]), ("weights", fact["terms_bytes"]))
    return ", ".join(f"{name} {format_bytes(count)}" for name, count in held if count is not None)


def _format_figure(value: object) -> str:
    if isinstance(value, Mapping):
        if len(value) > MAX_LISTED and all(isinstance(v, float) for v in value.values()):
            ends = (f(value, key=value.__getitem__) for f in (min, max))
            least, most = (f"{clean_text(k)}: {_format_figure(value[k])}" for k in ends)
            return f"({len(value)}, from {least} to {most})"
        return (
            "(" + ", ".join(f"{clean_text(k)}: {_format_figure(v)}" for k, v in value.items()) + ")"
        )
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_format_figure, value)) + ")"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else clean_text(value)


def _humanize_name(name: str) -> str:
    return clean_text(name).replace("_", " ")


def _parse_time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _join_parts(*parts: str) -> str:
    return "   ".join(part for part in parts if part)
