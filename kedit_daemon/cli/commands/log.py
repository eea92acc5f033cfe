"""The audit log: what changed, when and why; whether its chain is whole; a copy to carry away."""

import sqlite3
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from difflib import get_close_matches
from typing import Any

import click

from kedit_daemon.cli.completion import complete_facts, complete_kinds
from kedit_daemon.cli.context import (
    Command,
    Session,
    database,
    json_option,
    no_fact,
    pass_session,
    print_json,
)
from kedit_daemon.cli.usage import Suggesting
from kedit_daemon.report.event_kinds import KINDS
from kedit_daemon.report.render import statement
from kedit_daemon.report.render_log import answered, event_lines
from kedit_daemon.system.timespec import moment
from memory.db.queries import event_rows, fact_detail
from memory.facts import State

POLL_SECONDS = 0.5


def _moment(_ctx: click.Context, _parameter: click.Parameter, text: str | None) -> str | None:
    try:
        return None if text is None else moment(text, datetime.now(UTC))
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from None


def _known_kinds(
    _ctx: click.Context, _parameter: click.Parameter, kinds: tuple[str, ...]
) -> tuple[str, ...]:
    for kind in kinds:
        if kind not in KINDS:
            near = get_close_matches(kind, KINDS, 1)
            raise click.BadParameter(
                f"there is no kind {kind!r}."
                + (f" Did you mean {near[0]}?" if near else f" One of {', '.join(KINDS)}.")
            )
    return kinds


_FILTERS = (
    click.option("--since", callback=_moment, metavar="T", help="From then on: ISO-8601, 2h, 7d."),
    click.option(
        *("--kind", "kinds"),
        multiple=True,
        metavar="K",
        callback=_known_kinds,
        shell_complete=complete_kinds,
        help="Only events of this kind, such as fact_reverted; may be given again.",
    ),
    click.option(
        "--fact", metavar="ID", shell_complete=complete_facts, help="Only events of this fact."
    ),
    click.option("--subject", metavar="TEXT", help="Only of facts whose subject holds this text."),
    click.option(
        "--state",
        type=click.Choice([str(s) for s in State]),
        help="Only of facts that are in this state now.",
    ),
    click.option("--limit", "last", type=click.IntRange(1), help="Only the last so many."),
)


def _filters(command: Command) -> Command:
    """Which events are wanted; the options' names are those that `event_rows` takes."""
    for option in reversed(_FILTERS):
        command = option(command)
    return command


@click.group(cls=Suggesting, invoke_without_command=True)
@click.option("--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@_filters
@json_option
@pass_session
@click.pass_context
def log(
    ctx: click.Context, session: Session, /, follow: bool, as_json: bool, **wanted: Any
) -> None:
    """Review what changed, when and why.

    It tells the answers before and after, too: in colours on a terminal, elsewhere what went
    as [-old-] and what came as {+new+}. With --json it prints one object a line.

    \b
    Example:
      kedit-daemon log --since 2h
      kedit-daemon log --kind fact_reverted --kind fact_expired --limit 20
      kedit-daemon log --subject eyre --follow
    """
    if ctx.invoked_subcommand is not None:
        if follow or as_json or any(wanted.values()):
            raise click.UsageError(f"put options behind {ctx.invoked_subcommand!r}.")
        return
    coloured = sys.stdout.isatty() and ctx.color is not False
    with database(session.home) as conn, suppress(KeyboardInterrupt):
        for event in _events(session, conn, wanted, follow):
            if as_json:
                print_json(event, indent=None)
                continue
            said = _said(conn, event["fact_id"])
            click.echo("\n".join(event_lines(answered(conn, event), said, coloured)))


def _events(
    session: Session, conn: sqlite3.Connection, wanted: Mapping[str, Any], follow: bool = False
) -> Iterator[dict[str, Any]]:
    fact = wanted["fact"]
    if fact is not None and fact_detail(conn, fact) is None:
        raise no_fact(session, conn, fact)
    last, asked = 0, dict(wanted)
    while True:
        # Read before the events, so that what comes in between is seen the next time.
        newest = conn.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0]
        for event in event_rows(conn, last, **asked):
            yield event
            last = event["seq"]
        if not follow:
            return
        asked["last"] = None  # of what was there; all that comes is told
        last = max(last, newest)
        time.sleep(POLL_SECONDS)


def _said(conn: sqlite3.Connection, fact_id: str | None) -> str | None:
    row = conn.execute(
        "SELECT subject, prompt, target FROM facts WHERE id = ?", (fact_id,)
    ).fetchone()
    return statement(dict(row)) if row else None


@log.command()
@json_option
@pass_session
@click.pass_context
def verify(ctx: click.Context, session: Session, as_json: bool) -> None:
    """Check the chain of hashes.

    Also against the head that is kept outside the database. Exits with 1 when the chain is broken.

    \b
    Example:
      kedit-daemon log verify
    """
    from memory.db import event_log

    # The head first: the daemon may write events while the chain is walked.
    head = event_log.read_head(session.home.head)
    with database(session.home) as conn:
        verdict = event_log.verify(conn, head)
    if as_json:
        kept = None if head is None else {"seq": head[0], "hash": head[1]}
        print_json({**asdict(verdict), "kept_head": kept})
    elif verdict.intact:
        click.echo(f"intact: {verdict.events} events, the last has the hash {verdict.head_hash}")
    else:
        click.echo(f"broken: {verdict.problem}; the {verdict.events} events before are intact")
    if verdict.intact and head is None and verdict.events:
        click.echo("no head has been kept: a missing end would not be noticed", err=True)
    if not verdict.intact:
        click.echo("hint: keep a copy of state/ as it is, then put a backup back", err=True)
        ctx.exit(1)


@log.command()
@click.option(
    "--format",
    "form",
    type=click.Choice(["jsonl", "md", "csv"]),
    default="jsonl",
    show_default=True,
    help="One JSON object a line, with everything; a Markdown table; a spreadsheet.",
)
@_filters
@pass_session
def export(session: Session, /, form: str, **wanted: Any) -> None:
    """Print the log, to be kept or read elsewhere.

    In Markdown and CSV nothing that a fact says can act as markup or as a formula.

    \b
    Example:
      kedit-daemon log export > log.jsonl
      kedit-daemon log export --format md --since 7d > week.md
    """
    from kedit_daemon.report.export_log import (
        CSV_COLUMNS,
        MARKDOWN_HEAD,
        csv_line,
        csv_row,
        markdown_row,
    )

    heads = {"md": MARKDOWN_HEAD, "csv": csv_line(*CSV_COLUMNS)}
    row = {"md": markdown_row, "csv": csv_row}.get(form)
    with database(session.home) as conn:
        if form in heads:
            click.echo(heads[form])
        for event in _events(session, conn, wanted):
            if row is None:
                print_json(event, indent=None)
            else:
                click.echo(row(answered(conn, event), _said(conn, event["fact_id"])))
