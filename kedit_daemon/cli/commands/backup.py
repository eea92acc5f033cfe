"""The commands that back a home up and restore it."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from kedit_daemon.cli.context import (
    CliContext,
    add_dry_run_option,
    add_json_option,
    pass_cli_context,
    print_json,
)
from kedit_daemon.system.sanitize import clean_text

_FOLDER_PATH = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.argument("dest", type=_FOLDER_PATH)
@add_json_option
@pass_cli_context
def backup(session: CliContext, dest: Path, as_json: bool) -> None:
    """Write a copy of this home into the new folder DEST, and print its path.

    The daemon may be running. The backup has the settings, a snapshot of the database, and the
    weights and shards that the snapshot names. It has no index, which is built again, and no
    inbox: a file there has not been taken in yet, or is taken in completely.

    \b
    Example:
      kedit-daemon backup /srv/backups/facts-2026-03-01
    """
    from kedit_daemon.maintenance.backup import create_backup

    made = create_backup(session.home, dest, datetime.now(UTC))
    for name in made.manifest["lost"]:
        text = f"note: {name} is missing or damaged in the home: the daemon makes it again"
        click.echo(clean_text(text), err=True)
    if as_json:
        print_json({"path": str(made.path), "manifest": made.manifest})
        return
    click.echo(_summarize_manifest(made.manifest), err=True)
    click.echo(clean_text(made.path))


@click.command()
@click.argument("source", type=_FOLDER_PATH)
@click.option("--replace", is_flag=True, help="Move what the home has aside, to state.before-TIME.")
@add_dry_run_option
@pass_cli_context
def restore(session: CliContext, source: Path, replace: bool, dry_run: bool) -> None:
    """Put the home back into the state of the backup SOURCE, and print its path.

    Hashes and chain are checked before anything is changed; with --dry-run nothing is. The daemon
    must not run. At its next start it completes the home.

    \b
    Example:
      kedit-daemon restore /srv/backups/facts-2026-03-01 --dry-run
      kedit-daemon --home ./trial restore /srv/backups/facts-2026-03-01
    """
    from kedit_daemon.maintenance import restore as restoring

    if dry_run:
        checked = restoring.check_restore(session.home, source, replace)
        click.echo(_summarize_manifest(checked.manifest), err=True)
        click.echo("dry run: the backup is whole; nothing is changed", err=True)
        return
    done = restoring.restore(session.home, source, replace, datetime.now(UTC))
    for path in done.moved_aside:
        click.echo(f"moved aside: {clean_text(path)}", err=True)
    click.echo(_summarize_manifest(done.backup.manifest), err=True)
    click.echo(clean_text(session.home.root))
    click.echo(f"next: {clean_text(session.program)} run", err=True)


def _summarize_manifest(manifest: dict[str, Any]) -> str:
    facts = ", ".join(f"{count} {state}" for state, count in manifest["facts"].items()) or "none"
    chain = manifest["chain"]
    events = f"{chain['seq']} events to {chain['hash'][:12]}"
    generation = f"generation {manifest['generation']}"
    return clean_text(f"of {manifest['created_at']}: facts {facts}; {generation}, {events}")
