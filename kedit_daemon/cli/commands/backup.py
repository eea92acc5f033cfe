"""The commands that carry a home away, and bring it back."""

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
    """Write all that this home knows into the new folder DEST, and print its path.

    The daemon may run; it need not. In it are the settings, a snapshot of the database, and the
    weights and shards that the snapshot names. The index is not, which is built again, nor the
    inbox: what lies there has not been taken in yet, or has been taken in wholly.

    \b
    Example:
      kedit-daemon backup /srv/backups/facts-2026-03-01
    """
    from kedit_daemon.maintenance.backup import create_backup

    made = create_backup(session.home, dest, datetime.now(UTC))
    for name in made.manifest["lost"]:
        text = f"{name} is missing or damaged in the home: the daemon makes it again"
        click.echo(f"note: {clean_text(text)}", err=True)
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
    """Make the home what it was when the backup SOURCE was written, and print its path.

    Hashes and chain are checked before anything is changed; with --dry-run nothing is. The daemon
    must not run. What it finds at its next start it makes whole.

    \b
    Example:
      kedit-daemon restore /srv/backups/facts-2026-03-01 --dry-run
      kedit-daemon --home ./trial restore /srv/backups/facts-2026-03-01
    """
    from kedit_daemon.maintenance.restore import check_restore
    from kedit_daemon.maintenance.restore import restore as put_back

    if dry_run:
        click.echo(
            _summarize_manifest(check_restore(session.home, source, replace).manifest), err=True
        )
        click.echo("dry run: the backup is whole; nothing is changed", err=True)
        return
    done = put_back(session.home, source, replace, datetime.now(UTC))
    for path in done.moved_aside:
        click.echo(f"moved aside: {clean_text(path)}", err=True)
    click.echo(_summarize_manifest(done.backup.manifest), err=True)
    click.echo(clean_text(session.home.root))
    click.echo(f"next: {clean_text(session.program)} run", err=True)


def _summarize_manifest(manifest: dict[str, Any]) -> str:
    facts = ", ".join(f"{count} {state}" for state, count in manifest["facts"].items()) or "none"
    chain = manifest["chain"]
    said = f"generation {manifest['generation']}, {chain['seq']} events to {chain['hash'][:12]}"
    return clean_text(f"of {manifest['created_at']}: facts {facts}; {said}")
