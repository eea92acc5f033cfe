"""The command that settles what has failed, and for which nothing is to be done."""

from datetime import UTC, datetime

import click

from kedit_daemon.cli.completion import complete_show_names
from kedit_daemon.cli.context import (
    CliContext,
    add_dry_run_option,
    add_json_option,
    call_daemon,
    pass_cli_context,
    print_json,
)
from kedit_daemon.system.sanitize import clean_text


@click.command()
@click.argument("names", metavar="[ID|FILE]...", nargs=-1, shell_complete=complete_show_names)
@click.option("--all", "everything", is_flag=True, help="Dismiss all that `status` lists.")
@add_dry_run_option
@add_json_option
@pass_cli_context
def dismiss(
    session: CliContext, names: tuple[str, ...], everything: bool, dry_run: bool, as_json: bool
) -> None:
    """Settle facts that have failed, and files in failed/, so that `status` is content.

    Of a file the report is removed; the file itself stays in failed/. A failed or quarantined
    fact becomes reverted; it may be submitted again. Files need no running daemon.

    \b
    Example:
      kedit-daemon dismiss 3f2a9c01d4be facts-17.jsonl
      kedit-daemon dismiss --all --dry-run
    """
    from kedit_daemon.ingest.failed_files import dismiss_failed_file, list_failed_files

    if bool(names) == everything:
        raise click.UsageError("give ids of facts or names of files, or --all, and not both.")
    known = list_failed_files(session.home)
    files = [name for name in (known if everything else names) if name in known]
    facts = _list_failed_facts(session) if everything else [n for n in names if n not in known]
    done = list[str]()
    if facts:  # first: of an unknown one nothing is dismissed
        reply = call_daemon(session, "dismiss", {"facts": facts, "dry_run": dry_run})
        done = list(reply["dismissed"])
    done += [name for name in files if dry_run or dismiss_failed_file(session.home, name)]
    if as_json:
        print_json({"dismissed": done, "dry_run": dry_run})
        return
    for name in done:
        click.echo(clean_text(name))
    would = "would be " if dry_run else ""
    click.echo(f"{len(done)} {would}dismissed", err=True)


def _list_failed_facts(session: CliContext) -> list[str]:
    from kedit_daemon.report.status import gather_status

    found = gather_status(session.home, datetime.now(UTC), session.environ, session.program)
    return [fact["id"] for fact in found["failed_facts"]]
