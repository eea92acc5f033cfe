"""The commands that the running daemon carries out: ask, flush, audit, consolidate, revert."""

import sys
from typing import Any

import click

from kedit_daemon.cli.completion import complete_active
from kedit_daemon.cli.context import (
    Session,
    ask_daemon,
    database,
    dry_run_option,
    json_option,
    no_fact,
    pass_session,
    print_json,
)
from kedit_daemon.report.status import NEEDS_ATTENTION

MAX_TOKENS = 40
REVERT = "revert"  # the verdict that nothing should stay as it is


@click.command()
@click.argument("prompt")
@click.option("--base", is_flag=True, help="The unedited model's answer beside it.")
@click.option("--explain", is_flag=True, help="Which facts fired, with their scores.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1, 4096),
    default=MAX_TOKENS,
    show_default=True,
    help="The longest answer.",
)
@json_option
@pass_session
def ask(
    session: Session, prompt: str, base: bool, explain: bool, max_tokens: int, as_json: bool
) -> None:
    """Ask the edited model; it goes on from PROMPT.

    \b
    Example:
      kedit-daemon ask "The country that Lake Eyre lies in is"
      kedit-daemon ask --base --explain "The country that Lake Eyre lies in is"
    """
    arguments = {"prompt": prompt, "max_tokens": max_tokens, "base": base, "explain": explain}
    reply = ask_daemon(session, "ask", arguments)
    if as_json:
        print_json(reply)
        return
    from kedit_daemon.report.render_log import answer_lines

    click.echo("\n".join(answer_lines(reply, explain)))


@click.command()
@dry_run_option
@json_option
@pass_session
@click.pass_context
def flush(ctx: click.Context, session: Session, dry_run: bool, as_json: bool) -> None:
    """Move waiting facts into the weights, now.

    Exits with 1 when a fact failed, or the flush was refused.

    \b
    Example:
      kedit-daemon flush --dry-run
    """
    reply = ask_daemon(session, "flush", {"dry_run": dry_run})
    _report(reply, as_json)
    if reply.get("failed") or reply.get("verdict") == REVERT:
        ctx.exit(1)


@click.command()
@dry_run_option
@json_option
@pass_session
@click.pass_context
def audit(ctx: click.Context, session: Session, dry_run: bool, as_json: bool) -> None:
    """Measure the health of the weights, now, and act on it.

    Exits with 4 when the verdict is to revert.

    \b
    Example:
      kedit-daemon audit --dry-run
    """
    reply = ask_daemon(session, "audit", {"dry_run": dry_run})
    _report(reply, as_json)
    if reply.get("verdict") == REVERT:
        ctx.exit(NEEDS_ATTENTION)


@click.command()
@dry_run_option
@json_option
@pass_session
def consolidate(session: Session, dry_run: bool, as_json: bool) -> None:
    """Solve the weights anew over all live facts.

    It starts from the unedited weights.

    \b
    Example:
      kedit-daemon consolidate --dry-run
    """
    _report(ask_daemon(session, "consolidate", {"dry_run": dry_run}), as_json)


@click.command()
@click.argument("names", metavar="[ID]...", nargs=-1, shell_complete=complete_active)
@click.option("--generation", type=click.IntRange(0), help="Go back to this generation.")
@click.option("--yes", is_flag=True, help="Do not ask; needed off a terminal.")
@dry_run_option
@json_option
@pass_session
def revert(
    session: Session,
    names: tuple[str, ...],
    generation: int | None,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Take facts out, or go back to a generation.

    A fact that is taken out is taken out exactly, whatever came after it.

    \b
    Example:
      kedit-daemon revert 3f2a9c01d4be --dry-run
      kedit-daemon revert --generation 11 --yes
    """
    if bool(names) == (generation is not None):
        raise click.UsageError("give the ids of facts, or --generation N, and not both.")
    asking = not (yes or dry_run)
    if asking and not sys.stdin.isatty():
        raise click.UsageError("off a terminal nobody can be asked: add --yes, or --dry-run.")
    if asking:
        for line in _victims(session, names):
            click.echo(line, err=True)
        what = f"Go back to generation {generation}?" if names == () else "Take these facts out?"
        click.confirm(what, abort=True, err=True)
    arguments = {"facts": list(names), "generation": generation, "dry_run": dry_run}
    _report(ask_daemon(session, "revert", arguments), as_json)


def _victims(session: Session, names: tuple[str, ...]) -> list[str]:
    """What a person is asked about; whether it is allowed is for the daemon to say."""
    from kedit_daemon.report.render import fact_lines
    from memory.db.queries import fact_detail

    with database(session.home) as conn:
        found = []
        for name in names:
            if (fact := fact_detail(conn, name)) is None:
                raise no_fact(session, conn, name)
            found.append(fact)
    return list(fact_lines(found))


def _report(reply: dict[str, Any], json_wanted: bool) -> None:
    if json_wanted:
        print_json(reply)
        return
    from kedit_daemon.report.render_log import reply_lines

    for line in reply_lines(reply):
        click.echo(line)
