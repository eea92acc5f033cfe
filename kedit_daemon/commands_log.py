"""The audit log: what changed, when and why; whether its chain is whole; a copy to carry away."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import click

from kedit_daemon.moments import moment
from kedit_daemon.session import Session, database, json_option, pass_session, print_json

POLL_SECONDS = 0.5
_TABLE = "| event | at (UTC) | kind | fact | statement | what |\n|---|---|---|---|---|---|"


@dataclass(frozen=True)
class _Wanted:
    """Which events to tell."""

    since: str | None = None
    kind: str | None = None
    fact: str | None = None


def _moment(_ctx: click.Context, _parameter: click.Parameter, text: str | None) -> str | None:
    try:
        return None if text is None else moment(text, datetime.now(UTC))
    except ValueError as error:
        raise click.BadParameter(f"{error}.") from None


@click.group(invoke_without_command=True)
@click.option("--follow", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option("--since", callback=_moment, metavar="T", help="From this moment on, or 90s, 2h, 7d.")
@click.option("--kind", help="Only events of this kind, such as fact_reverted.")
@click.option("--fact", metavar="ID", help="Only events of this fact.")
@json_option
@pass_session
@click.pass_context
def log(
    ctx: click.Context,
    session: Session,
    follow: bool,
    since: str | None,
    kind: str | None,
    fact: str | None,
    as_json: bool,
) -> None:
    """Review what changed, when and why.

    It tells the answers before and after, too. With --json it prints one object a line.

    \b
    Example:
      kedit-daemon log --since 2h
      kedit-daemon log --kind fact_reverted --json
      kedit-daemon log verify
    """
    if ctx.invoked_subcommand is not None:
        if follow or since or kind or fact or as_json:
            raise click.UsageError(f"put options behind {ctx.invoked_subcommand!r}.")
        return
    with database(session.home) as conn, suppress(KeyboardInterrupt):
        for event in _events(conn, _Wanted(since, kind, fact), follow):
            _tell(conn, event, as_json)


def _events(conn: sqlite3.Connection, wanted: _Wanted, follow: bool) -> Iterator[dict[str, Any]]:
    from memory.reading import event_rows

    last = 0
    while True:
        # Read before the events, so that what comes in between is seen the next time.
        newest = conn.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0]
        for event in event_rows(conn, last, wanted.since, wanted.kind, wanted.fact):
            yield event
            last = event["seq"]
        if not follow:
            return
        last = max(last, newest)
        time.sleep(POLL_SECONDS)


def _tell(conn: sqlite3.Connection, event: dict[str, Any], json_wanted: bool) -> None:
    if json_wanted:
        print_json(event, indent=None)
        return
    from kedit_daemon.views_log import event_lines

    click.echo("\n".join(event_lines(event, _said(conn, event["fact_id"]))))


def _said(conn: sqlite3.Connection, fact_id: str | None) -> str | None:
    from kedit_daemon.views import statement

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
    from memory import ledger

    # The head first: the daemon may write events while the chain is walked.
    head = ledger.read_head(session.home.head)
    with database(session.home) as conn:
        verdict = ledger.verify(conn, head)
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
    type=click.Choice(["jsonl", "markdown"]),
    default="jsonl",
    show_default=True,
    help="One JSON object a line, hashes included; or a table.",
)
@pass_session
def export(session: Session, form: str) -> None:
    """Print the whole log, to be kept elsewhere.

    \b
    Example:
      kedit-daemon log export > log.jsonl
      kedit-daemon log export --format markdown > log.md
    """
    from kedit_daemon.views_log import event_row

    with database(session.home) as conn:
        if form == "markdown":
            click.echo(_TABLE)
        for event in _events(conn, _Wanted(), follow=False):
            if form == "jsonl":
                print_json(event, indent=None)
            else:
                click.echo(event_row(event, _said(conn, event["fact_id"])))
