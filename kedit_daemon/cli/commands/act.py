"""The commands that the running daemon executes: ask, flush, audit, consolidate, revert."""

import sys
from pathlib import Path
from typing import Any

import click

from kedit_daemon.cli.completion import complete_active_facts
from kedit_daemon.cli.context import (
    CliContext,
    add_dry_run_option,
    add_json_option,
    call_daemon,
    pass_cli_context,
    print_json,
    unknown_fact_error,
)
from kedit_daemon.home import open_database
from kedit_daemon.report.status import EXIT_NEEDS_ATTENTION

DEFAULT_MAX_TOKENS = 40
REVERT_VERDICT = "revert"


@click.command()
@click.argument("prompt")
@click.option("--chat", is_flag=True, help="Ask PROMPT in a chat, through the model's template.")
@click.option("--system", metavar="TEXT", help="With --chat: a system message before it.")
@click.option(
    "--turn",
    "turns",
    metavar="TEXT",
    multiple=True,
    help="With --chat: an earlier turn; a user's, then the reply, and so on.",
)
@click.option(
    "--image",
    "image",
    type=click.Path(exists=True, dir_okay=False),
    help="A picture that PROMPT is about.",
)
@click.option("--base", is_flag=True, help="Show the unedited model's answer, too.")
@click.option("--explain", is_flag=True, help="Show which facts fired, with their scores.")
@click.option(
    "--max-tokens",
    type=click.IntRange(1, 4096),
    default=DEFAULT_MAX_TOKENS,
    show_default=True,
    help="The length of the answer, at most.",
)
@add_json_option
@pass_cli_context
def ask(
    session: CliContext,
    prompt: str,
    chat: bool,
    system: str | None,
    turns: tuple[str, ...],
    image: str | None,
    base: bool,
    explain: bool,
    max_tokens: int,
    as_json: bool,
) -> None:
    """Ask the edited model; it continues PROMPT, or with --chat replies to it.

    \b
    Example:
      kedit-daemon ask "The country that Lake Eyre lies in is"
      kedit-daemon ask --base --explain "The country that Lake Eyre lies in is"
      kedit-daemon ask --chat "Which country does Lake Eyre lie in?"
      kedit-daemon ask --chat --image tower.png "What is the name of this building?"
    """
    arguments: dict[str, Any] = {"max_tokens": max_tokens, "base": base, "explain": explain}
    if image is not None:
        from memory.picture_files import check_picture, make_data_url
        from memory.picture_marks import join_mark

        data = Path(image).read_bytes()
        arguments["pictures"] = [make_data_url(data)]
        prompt = join_mark(check_picture(data), prompt)
    if chat:
        arguments["messages"] = _list_messages(prompt, system, turns)
    elif system is not None or turns:
        raise click.UsageError("--system and --turn belong to a chat: add --chat")
    else:
        arguments["prompt"] = prompt
    reply = call_daemon(session, "ask", arguments)
    if as_json:
        print_json(reply)
        return
    from kedit_daemon.report.render_answer import render_answer

    click.echo("\n".join(render_answer(reply, explain)))


def _list_messages(
    question: str, system: str | None, turns: tuple[str, ...]
) -> list[dict[str, str]]:
    """Return the messages of a chat, the question last."""
    if len(turns) % 2:
        raise click.UsageError("--turn: a user's turn needs its reply, in a --turn of its own")
    spoken = zip(("user", "assistant") * (len(turns) // 2), turns, strict=True)
    said = [*spoken, ("user", question)]
    if system is not None:
        said.insert(0, ("system", system))
    return [{"role": role, "content": text} for role, text in said]


@click.command()
@add_dry_run_option
@add_json_option
@pass_cli_context
@click.pass_context
def flush(ctx: click.Context, session: CliContext, dry_run: bool, as_json: bool) -> None:
    """Move waiting facts into the weights, now.

    Facts that the weights do not bear are kept in the side memory, where they stay live. Exits with
    1 when a fact failed, or the flush was refused.

    \b
    Example:
      kedit-daemon flush --dry-run
    """
    reply = call_daemon(session, "flush", {"dry_run": dry_run})
    _print_reply(reply, as_json)
    if reply.get("failed") or reply.get("verdict") == REVERT_VERDICT:
        ctx.exit(1)


@click.command()
@add_dry_run_option
@add_json_option
@pass_cli_context
@click.pass_context
def audit(ctx: click.Context, session: CliContext, dry_run: bool, as_json: bool) -> None:
    """Measure the health of the weights, now, and act on it.

    Exits with 4 when the verdict is to revert.

    \b
    Example:
      kedit-daemon audit --dry-run
    """
    reply = call_daemon(session, "audit", {"dry_run": dry_run})
    _print_reply(reply, as_json)
    if reply.get("verdict") == REVERT_VERDICT:
        ctx.exit(EXIT_NEEDS_ATTENTION)


@click.command()
@add_dry_run_option
@add_json_option
@pass_cli_context
def consolidate(session: CliContext, dry_run: bool, as_json: bool) -> None:
    """Solve the weights again over all live facts, from the unedited weights.

    \b
    Example:
      kedit-daemon consolidate --dry-run
    """
    _print_reply(call_daemon(session, "consolidate", {"dry_run": dry_run}), as_json)


@click.command()
@click.argument("names", metavar="[ID]...", nargs=-1, shell_complete=complete_active_facts)
@click.option("--generation", type=click.IntRange(0), help="Go back to this generation.")
@click.option("--yes", is_flag=True, help="Do not ask; needed off a terminal.")
@add_dry_run_option
@add_json_option
@pass_cli_context
def revert(
    session: CliContext,
    names: tuple[str, ...],
    generation: int | None,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Take facts out, or go back to a generation.

    A fact is taken out exactly, whatever came after it. An id of yours that several facts have
    takes out all of them.

    \b
    Example:
      kedit-daemon revert 3f2a9c01d4be --dry-run
      kedit-daemon revert --generation 11 --yes
    """
    if bool(names) == (generation is not None):
        raise click.UsageError("give the ids of facts, or --generation N, and not both.")
    if not (yes or dry_run):
        _confirm_revert(session, names, generation)
    arguments = {"facts": list(names), "generation": generation, "dry_run": dry_run}
    _print_reply(call_daemon(session, "revert", arguments), as_json)


def _confirm_revert(session: CliContext, names: tuple[str, ...], generation: int | None) -> None:
    """Show the facts and ask; the daemon decides whether the revert is allowed."""
    from kedit_daemon.report.render import render_facts
    from memory.db.queries import fetch_fact_details

    if not sys.stdin.isatty():
        raise click.UsageError("off a terminal nobody can be asked: add --yes, or --dry-run.")
    facts = dict[str, dict[str, Any]]()
    with open_database(session.home) as conn:
        for name in names:
            if not (found := fetch_fact_details(conn, name)):
                raise unknown_fact_error(session, conn, name)
            facts |= {fact["id"]: fact for fact in found}
    for line in render_facts(list(facts.values())):
        click.echo(line, err=True)
    question = "Take these facts out?" if names else f"Go back to generation {generation}?"
    click.confirm(question, abort=True, err=True)


def _print_reply(reply: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(reply)
        return
    from kedit_daemon.report.render_log import render_reply

    click.echo("\n".join(render_reply(reply)))
