"""The command that exports the edited model."""

from pathlib import Path

import click

from kedit_daemon.cli.context import CliContext, add_json_option, pass_cli_context, print_json
from kedit_daemon.system.sanitize import clean_text

KINDS = ("merged", "delta", "lora", "gguf", "gguf-lora", "facts")


@click.command()
@click.argument("kind", type=click.Choice(KINDS))
@click.argument("dest", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    metavar="N",
    help="Delete this home's older exports of the kind in DEST, so that N are left.",
)
@add_json_option
@pass_cli_context
def export(session: CliContext, kind: str, dest: Path, keep: int | None, as_json: bool) -> None:
    """Write the active generation into a new folder in DEST, and print its path.

    merged is the whole model, for anything that reads Hugging Face folders; delta only the changed
    tensors; lora a PEFT adapter; gguf the model's own GGUF file with the changed tensors in it, and
    gguf-lora an adapter, both for llama.cpp; facts the live facts as JSON Lines, as submit takes
    them. The daemon need not run. Facts in the side memory are only in facts.

    \b
    Example:
      kedit-daemon export merged /srv/models
      kedit-daemon export lora /srv/adapters --keep 3
    """
    from kedit_daemon.publish.export.create_export import create_export

    done = create_export(session.home, kind, dest, keep)
    for note in done.notes:
        click.echo(f"note: {clean_text(note)}", err=True)
    if as_json:
        print_json(done.as_dict())
        return
    if done.placed.existed:
        click.echo("it exists already, and is left as it is", err=True)
    if done.placed.removed:
        click.echo(f"deleted: {', '.join(map(clean_text, done.placed.removed))}", err=True)
    click.echo(clean_text(done.placed.path))
