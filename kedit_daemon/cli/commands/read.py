"""The commands that only read: status, facts, show."""

import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import click

from kedit_daemon.cli.completion import complete_show_names
from kedit_daemon.cli.context import (
    CliContext,
    add_json_option,
    pass_cli_context,
    print_json,
    unknown_fact_error,
)
from kedit_daemon.home import open_database
from kedit_daemon.system.sanitize import clean_text
from memory.errors import KeditError
from memory.facts import FactState

WATCH_SECONDS = 2.0


@click.command()
@click.option("--watch", is_flag=True, help="Refresh every two seconds, until Ctrl-C.")
@add_json_option
@pass_cli_context
@click.pass_context
def status(ctx: click.Context, session: CliContext, watch: bool, as_json: bool) -> None:
    """Show how the daemon is, on one screen.

    It works without the daemon, too. Exits with 3 when the daemon is not running, with 4 when
    something needs attention.

    \b
    Example:
      kedit-daemon status
      kedit-daemon status --json
    """
    if watch:
        _watch_status(ctx, session, as_json)
        return
    found, code = _gather_status(session)
    if as_json:
        print_json(found)
    else:
        click.echo(_format_status(found))
    ctx.exit(code)


def _gather_status(session: CliContext) -> tuple[dict[str, Any], int]:
    from kedit_daemon.report.status import choose_exit_code, gather_status

    found = gather_status(session.home, datetime.now(UTC), session.environ, session.program)
    return found, choose_exit_code(found)


def _format_status(found: dict[str, Any]) -> str:
    from kedit_daemon.report.render import render_status

    return "\n".join(render_status(found))


def _watch_status(ctx: click.Context, session: CliContext, as_json: bool) -> None:
    is_plain = as_json or session.environ.get("TERM") in ("dumb", "unknown")
    with suppress(KeyboardInterrupt):
        if is_plain or not sys.stdout.isatty():
            _repeat_status(session, as_json)
        else:
            _redraw_status(ctx, session)


def _repeat_status(session: CliContext, as_json: bool) -> None:
    """Print the status again and again, below the last one."""
    rule = ""
    while True:
        found, _ = _gather_status(session)
        if as_json:
            print_json(found, None)
        else:
            click.echo(rule + _format_status(found))
        rule = f"---- {found['at']} ----\n"
        time.sleep(WATCH_SECONDS)


def _redraw_status(ctx: click.Context, session: CliContext) -> None:
    """Draw the status again and again, in place."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(no_color=ctx.color is False)
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while True:
            found, _ = _gather_status(session)
            foot = f"{found['at']}, again every {WATCH_SECONDS:.0f} s; Ctrl-C ends"
            text = f"{_format_status(found)}\n{click.style(foot, dim=True)}"
            live.update(Text.from_ansi(text), refresh=True)
            time.sleep(WATCH_SECONDS)


@click.command()
@click.option("--state", type=click.Choice([str(s) for s in FactState]), help="Only in this state.")
@click.option("--subject", help="Only where the subject contains this text, in any case.")
@add_json_option
@pass_cli_context
def facts(session: CliContext, state: str | None, subject: str | None, as_json: bool) -> None:
    """List the facts, in the order of their arrival.

    \b
    Example:
      kedit-daemon facts --state live-side
      kedit-daemon facts --subject eyre --json
    """
    from memory.db.queries import fetch_facts

    with open_database(session.home) as conn:
        rows = fetch_facts(conn, state, subject)
    if as_json:
        print_json(rows)
        return
    from kedit_daemon.report.render import render_facts

    for line in render_facts(rows):
        click.echo(line)
    if not rows:
        click.echo("no such facts", err=True)


@click.command()
@click.argument("name", metavar="ID", shell_complete=complete_show_names)
@add_json_option
@pass_cli_context
def show(session: CliContext, name: str, as_json: bool) -> None:
    """Show one fact, by its id or yours.

    With its history, keys, tier, generation and probe results, also those of a chat. An id of
    yours that several facts have shows all of them; with --json in a list. The name of a file in
    failed/ shows what is wrong with that file.

    \b
    Example:
      kedit-daemon show 3f2a9c01d4be
      kedit-daemon show facts-17.jsonl
    """
    from kedit_daemon.ingest.failed_files import read_failed_report

    report = read_failed_report(session.home, name)
    facts = _find_facts(session, name, wanted=report is None)
    if as_json:
        print_json(facts if len(facts) > 1 else facts[0] if facts else report)
    elif facts:
        if len(facts) > 1:
            told = f"{len(facts)} facts have the id {name}"
            click.echo(clean_text(told), err=True)
        for fact in facts:
            _show_fact(fact)
    else:
        _show_failed_file(session, name, report or {})


def _find_facts(session: CliContext, name: str, wanted: bool) -> list[dict[str, Any]]:
    """Return the facts of a name; where one is `wanted`, that there is none is an error."""
    from memory.db.queries import fetch_fact_details

    try:
        with open_database(session.home) as conn:
            facts = fetch_fact_details(conn, name)
            if not facts and wanted:
                raise unknown_fact_error(session, conn, name)
    except (KeditError, UnicodeEncodeError):  # a file's name may be any bytes, a fact's may not
        if wanted:
            raise
        return []
    return facts


def _show_fact(fact: dict[str, Any]) -> None:
    from kedit_daemon.report.render import render_fact_detail
    from kedit_daemon.report.render_log import render_event

    history = [line for event in fact["events"] for line in render_event(event, None)]
    click.echo("\n".join([*render_fact_detail(fact), *(f"  {line}" for line in history)]))


def _show_failed_file(session: CliContext, name: str, report: dict[str, Any]) -> None:
    from kedit_daemon.ingest.failed_files import failed_folder
    from kedit_daemon.report.render import render_failed_file

    folder = str(failed_folder(session.home))
    click.echo("\n".join(render_failed_file(name, folder, report)))
