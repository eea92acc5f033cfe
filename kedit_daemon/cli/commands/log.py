"""The commands for the audit log: show it, verify its chain, export it."""

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

from kedit_daemon.cli.completion import complete_event_kinds, complete_facts
from kedit_daemon.cli.context import (
    CliContext,
    Command,
    add_json_option,
    pass_cli_context,
    print_json,
    unknown_fact_error,
)
from kedit_daemon.home import open_database
from kedit_daemon.report.event_kinds import EVENT_KINDS
from kedit_daemon.report.render import format_statement
from kedit_daemon.report.render_log import add_prior_answer, render_event
from kedit_daemon.system.timespec import parse_time
from memory.db.queries import fetch_events, fetch_fact_detail
from memory.facts import FactState

POLL_SECONDS = 0.5


def _parse_since(_ctx: click.Context, _parameter: click.Parameter, text: str | None) -> str | None:
    try:
        return None if text is None else parse_time(text, datetime.now(UTC))
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from None


def _check_kinds(
    _ctx: click.Context, _parameter: click.Parameter, kinds: tuple[str, ...]
) -> tuple[str, ...]:
    for kind in kinds:
        if kind not in EVENT_KINDS:
            similar = get_close_matches(kind, EVENT_KINDS, 1)
            hint = f"Did you mean {similar[0]}?" if similar else f"One of {', '.join(EVENT_KINDS)}."
            raise click.BadParameter(f"there is no kind {kind!r}. {hint}")
    return kinds


_FILTER_OPTIONS = (
    click.option(
        "--since", callback=_parse_since, metavar="T", help="Only from then on: ISO-8601, 2h, 7d."
    ),
    click.option(
        *("--kind", "kinds"),
        multiple=True,
        metavar="K",
        callback=_check_kinds,
        shell_complete=complete_event_kinds,
        help="Only events of this kind, such as fact_reverted; may be given again.",
    ),
    click.option(
        "--fact", metavar="ID", shell_complete=complete_facts, help="Only events of this fact."
    ),
    click.option(
        "--subject", metavar="TEXT", help="Only of facts whose subject contains this text."
    ),
    click.option(
        "--state",
        type=click.Choice([str(s) for s in FactState]),
        help="Only of facts that are in this state now.",
    ),
    click.option(
        "--limit", "last", metavar="N", type=click.IntRange(1), help="Only the last N events."
    ),
)


def _add_filter_options(command: Command) -> Command:
    """Add the options that select events; `fetch_events` takes them by the same names."""
    for option in reversed(_FILTER_OPTIONS):
        command = option(command)
    return command


@click.group(invoke_without_command=True)
@click.option("--follow", is_flag=True, help="Wait for new events, until Ctrl-C.")
@_add_filter_options
@add_json_option
@pass_cli_context
@click.pass_context
def log(
    ctx: click.Context, session: CliContext, /, follow: bool, as_json: bool, **wanted: Any
) -> None:
    """Review what changed, when and why.

    It shows the answers before and after, too: in colours on a terminal, elsewhere as [-old-]
    and {+new+}. With --json it prints one object a line.

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
    with open_database(session.home) as conn, suppress(KeyboardInterrupt):
        for event in _iter_events(session, conn, wanted, follow):
            if as_json:
                print_json(event, indent=None)
                continue
            statement = _find_statement(conn, event["fact_id"])
            event = add_prior_answer(conn, event)
            click.echo("\n".join(render_event(event, statement, coloured)))


def _iter_events(
    session: CliContext, conn: sqlite3.Connection, wanted: Mapping[str, Any], follow: bool = False
) -> Iterator[dict[str, Any]]:
    fact = wanted["fact"]
    if fact is not None and fetch_fact_detail(conn, fact) is None:
        raise unknown_fact_error(session, conn, fact)
    last, filters = 0, dict(wanted)
    while True:
        # Read before the events, so that an event in between is seen the next time.
        newest = conn.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0]
        for event in fetch_events(conn, last, **filters):
            yield event
            last = event["seq"]
        if not follow:
            return
        filters["last"] = None  # the limit is for the events before; all new ones are shown
        last = max(last, newest)
        time.sleep(POLL_SECONDS)


def _find_statement(conn: sqlite3.Connection, fact_id: str | None) -> str | None:
    sql = "SELECT subject, prompt, target FROM facts WHERE id = ?"
    row = conn.execute(sql, (fact_id,)).fetchone()
    return format_statement(dict(row)) if row else None


@log.command()
@add_json_option
@pass_cli_context
@click.pass_context
def verify(ctx: click.Context, session: CliContext, as_json: bool) -> None:
    """Check the chain of hashes, also against the head that is kept outside the database.

    Exits with 1 when the chain is broken.

    \b
    Example:
      kedit-daemon log verify
    """
    from memory.db import event_log

    # The head first: the daemon may write events while the chain is checked.
    head = event_log.read_head(session.home.head_file)
    with open_database(session.home) as conn:
        verdict = event_log.verify_chain(conn, head)
    if as_json:
        kept = None if head is None else {"seq": head[0], "hash": head[1]}
        print_json({**asdict(verdict), "kept_head": kept})
    elif verdict.intact:
        click.echo(f"intact: {verdict.events} events, the last has the hash {verdict.head_hash}")
    else:
        click.echo(f"broken: {verdict.problem}; the {verdict.events} events before are intact")
    if verdict.intact and head is None and verdict.events:
        click.echo("no head has been kept: a missing end would go unnoticed", err=True)
    if not verdict.intact:
        click.echo("hint: keep a copy of state/ as it is, then restore a backup", err=True)
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
@_add_filter_options
@pass_cli_context
def export(session: CliContext, /, form: str, **wanted: Any) -> None:
    """Print the log, to keep it or read it elsewhere.

    In Markdown and CSV no text of a fact can act as markup or as a formula.

    \b
    Example:
      kedit-daemon log export > log.jsonl
      kedit-daemon log export --format md --since 7d > week.md
    """
    from kedit_daemon.report.export_log import (
        CSV_COLUMNS,
        MARKDOWN_HEAD,
        format_csv_line,
        format_csv_row,
        format_markdown_row,
    )

    heads = {"md": MARKDOWN_HEAD, "csv": format_csv_line(*CSV_COLUMNS)}
    row = {"md": format_markdown_row, "csv": format_csv_row}.get(form)
    with open_database(session.home) as conn:
        if form in heads:
            click.echo(heads[form])
        for event in _iter_events(session, conn, wanted):
            if row is None:
                print_json(event, indent=None)
                continue
            statement = _find_statement(conn, event["fact_id"])
            click.echo(row(add_prior_answer(conn, event), statement))
