"""What people see of the situation and of facts: lines from the data that `--json` prints.

Every text that may come from a fact goes through `clean` or `clip`.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from typing import Any

import click

from kedit_daemon.system.sanitize import clean, clip
from memory.facts import LIVE, State, fill

LIST_CHARS = 120
LISTED = 8  # numbers by name; of more, as of every layer of a model, the least and the greatest
_COLOURS = {"running": "green", "starting": "yellow", "paused": "yellow", "stopped": "red"}
_STATE_COLOURS = {
    **dict.fromkeys(LIVE, "green"),
    State.FAILED: "red",
    State.REJECTED: "red",
    State.RECEIVED: "yellow",
}


def status_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """One screen."""
    now = datetime.fromisoformat(found["at"])
    state = click.style(found["state"], fg=_COLOURS[found["state"]], bold=True)
    since = age((now - _moment(found["since"])).total_seconds()) if found["since"] else ""
    pid = f"pid {found['pid']}" if found["pid"] else ""
    model = f"model {clean(found['model'])}" if found["model"] else ""
    generation = f"generation {found['generation']}"
    device = clean(found["device"] or "")
    yield _spaced(f"● kedit-daemon  {state}", since, pid, model, device, generation)
    pending, side = found["pending"], found["side_memory"]
    waiting = f"pending {pending['count']:,}"
    if pending["oldest_seconds"] is not None:
        waiting += f" (oldest {age(pending['oldest_seconds'])})"
    yield _spaced(
        f"  {waiting}",
        f"applied today {found['applied_today']:,}",
        f"failed today {found['failed_today']:,}",
        f"side memory {side['keys']:,} keys, {size(side['bytes'])}",
    )
    counts = [f"{name} {count:,}" for name, count in found["facts"].items() if count]
    yield _spaced("  facts", *(counts or ["none yet"]))
    if found["weights_capacity"] is not None:
        yield _weights_line(found)
    if cost := found["flush_cost"]:
        each = f"{cost['per_batch']:.1f} s, and {cost['per_fact']:.2f} s for each fact in it"
        yield f"  flushes   {cost['flushes']:,}, each {each}"
    yield _audit_line(found, now)
    yield from _job_lines(found["jobs"], now)
    for warning in found["warnings"]:
        mark = click.style("!", fg="red" if warning["attention"] else "yellow", bold=True)
        yield f"{mark} {clip(warning['message'], LIST_CHARS)}  → {clean(warning['command'])}"


def fact_lines(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A table of facts."""
    if rows:
        yield click.style(f"{'ID':12}  {'STATE':12}  {'GEN':>4}  FACT", bold=True)
    for row in rows:
        state = click.style(f"{row['state']:12}", fg=_STATE_COLOURS.get(row["state"]))
        generation = "" if row["generation"] is None else row["generation"]
        said = clip(statement(row), LIST_CHARS)
        yield f"{clean(row['id']):12}  {state}  {generation:>4}  {said}"


def detail_lines(fact: Mapping[str, Any]) -> Iterator[str]:
    """One fact with everything that is known of it."""
    yield click.style(statement(fact), bold=True)
    state = click.style(fact["state"], fg=_STATE_COLOURS.get(fact["state"]))
    for name, value in detail_fields(fact):
        shown = state + value.removeprefix(fact["state"]) if name == "state" else value
        yield f"  {name:<12} {shown}"
    record = fact["record"]
    for prompt in record.get("paraphrases", ()):
        yield f"  also asked   {clean(fill(prompt, fact['subject']))}"
    for near in record.get("neighbours", ()):
        answer = f" → {clean(near['answer'])}" if near.get("answer") else ""
        yield f"  must stay    {clean(near['prompt'])}{answer}"
    for edit in fact["edits"]:
        probe = f"  {figures_text(edit['probe'])}" if edit["probe"] else ""
        yield (
            f"  edit         {when(edit['at'])}  {clean(edit['tier'])}  {clean(edit['outcome'])}"
            f"  {edit['seconds']:.1f} s{probe}"
        )


def detail_fields(fact: Mapping[str, Any]) -> list[tuple[str, str]]:
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
        "probe": figures_text(fact["probe"]),
        "received": f"{fact['received_at']} in {clean(fact['file_name'])}",
        "changed": fact["changed_at"],
        "valid from": record.get("valid_from"),
        "valid until": fact["valid_until"],
        "source": record.get("source"),
        "tags": ", ".join(record.get("tags", ())),
        "attempts": fact["attempts"],
        "keys": _held(fact),
    }
    return [(name, clean(value)) for name, value in known.items() if value not in (None, "")]


def failed_file_lines(name: str, folder: str, report: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with a file in failed/, and how to go on."""
    file, at = clean(report.get("file", name)), clean(report.get("at") or "")
    yield click.style(f"{file}  failed {at}", bold=True)
    for error in report["errors"]:
        yield f"  line {clean(error.get('line'))}: {clean(error.get('problem'))}"
        yield f"    remedy  {clean(error.get('remedy'))}"
        if error.get("record"):
            yield f"    record  {clip(error['record'], LIST_CHARS)}"
    yield f"Correct {clean(folder)}/{clean(name)} and hand it in with submit;"
    yield f"then remove it, and {clean(name)}.error.json beside it."


def statement(row: Mapping[str, Any]) -> str:
    """What a fact says, in one line."""
    asked = fill(str(row["prompt"]), str(row["subject"]))
    return f"{clean(asked)} → {clean(row['target'])}"


def audit_figures(audit: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The figures of an audit that tell most."""
    names = ("norm_ratio", "perplexity_ratio", "agreement")
    figures = audit["figures"]
    return [
        (_words(name), _figure(figures[name]))
        for name in names
        if figures.get(name) not in (None, {})
    ]


def figures_text(figures: Mapping[str, Any] | None) -> str:
    """Measured numbers on one line."""
    if not figures:
        return ""
    return ", ".join(f"{_words(name)} {_figure(value)}" for name, value in figures.items())


def age(seconds: float) -> str:
    """A duration in its two largest units."""
    whole = max(0, int(seconds))
    units = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))
    for (name, length), (smaller, part) in pairwise(units):
        if whole >= length:
            return f"{whole // length}{name} {whole % length // part}{smaller}"
    return f"{whole} s"


def size(count: float) -> str:
    """A number of bytes."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{count:.{0 if count >= 10 else 1}f} {unit}"
    return f"{count / 1000:.1f} GB"


def when(at: str, now: datetime | None = None) -> str:
    """A moment to the second; on the day of `now` only the time."""
    moment = _moment(at)
    today = now is not None and moment.date() == now.date()
    return moment.strftime("%H:%M" if today else "%Y-%m-%d %H:%M:%S")


def _weights_line(found: Mapping[str, Any]) -> str:
    """A count of facts that no figure limits is only as far as the daemon can foresee."""
    held, most, limit = (found[f"weights_{key}"] for key in ("facts", "capacity", "limit"))
    facts = "1 fact" if held == 1 else f"{held:,} facts"
    if limit is None:
        return f"  weights   {facts} of at least {most:,} they bear"
    return f"  weights   {facts} of about {most:,} they bear ({clean(limit)})"


def _audit_line(found: Mapping[str, Any], now: datetime) -> str:
    audit = found["last_audit"]
    if audit is None:
        return f"  last audit  none yet  (chain {found['events']:,} events)"
    told = [f"{name} {value}" for name, value in audit_figures(audit)]
    told.append(f"chain {found['events']:,} events")
    verdict = click.style(clean(audit["verdict"]), bold=True)
    return f"  last audit  {verdict}  {when(audit['at'], now)}  ({', '.join(told)})"


def _job_lines(jobs: Mapping[str, Any], now: datetime) -> Iterator[str]:
    ran = {name: job for name, job in jobs.items() if job["started_at"]}
    last = [
        f"{clean(name)} {clean(job['outcome'] or 'at work')} {when(job['started_at'], now)}"
        for name, job in ran.items()
    ]
    due = sorted((job["next"], name) for name, job in jobs.items() if job["next"])
    coming = [f"{clean(name)} {when(at, now)}" for at, name in due]
    if last:
        yield f"  last jobs   {' · '.join(last)}"
    if coming:
        yield f"  next jobs   {' · '.join(coming)}  UTC"


def _held(fact: Mapping[str, Any]) -> str:
    held = (("side memory", fact["side_bytes"]), ("weights", fact["terms_bytes"]))
    return ", ".join(f"{name} {size(count)}" for name, count in held if count is not None)


def _figure(value: object) -> str:
    if isinstance(value, Mapping):
        if len(value) > LISTED and all(isinstance(v, float) for v in value.values()):
            ends = (f(value, key=value.__getitem__) for f in (min, max))
            least, most = (f"{clean(k)}: {_figure(value[k])}" for k in ends)
            return f"({len(value)}, from {least} to {most})"
        return "(" + ", ".join(f"{clean(k)}: {_figure(v)}" for k, v in value.items()) + ")"
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_figure, value)) + ")"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else clean(value)


def _words(name: str) -> str:
    return clean(name).replace("_", " ")


def _moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _spaced(*parts: str) -> str:
    return "   ".join(part for part in parts if part)
