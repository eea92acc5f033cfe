"""The commands for a shell of one's own: completion, and the manual page."""

import shutil
import subprocess
import sys

import click
from click.shell_completion import get_completion_class

from kedit_daemon.home import PROGRAM_NAME


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what makes a shell complete commands, options, states and ids of facts.

    \b
    Example:
      echo 'source <(kedit-daemon completion bash)' >> ~/.bashrc
      kedit-daemon completion zsh > "${fpath[1]}/_kedit-daemon"
      kedit-daemon completion fish > ~/.config/fish/completions/kedit-daemon.fish
    """
    made = get_completion_class(shell)
    if made is None:
        raise click.UsageError(f"{shell} is not a shell that click completes for.")
    variable = f"_{PROGRAM_NAME.replace('-', '_').upper()}_COMPLETE"
    click.echo(made(ctx.find_root().command, {}, PROGRAM_NAME, variable).source())


@click.command()
@click.pass_context
def man(ctx: click.Context) -> None:
    """Show the manual page, made from the commands themselves.

    Off a terminal it prints the page's source.

    \b
    Example:
      kedit-daemon man
      kedit-daemon man > /usr/local/share/man/man1/kedit-daemon.1
    """
    from kedit_daemon.cli.manpage import render_page

    text = render_page(ctx.find_root())
    viewer = shutil.which("man")
    if viewer is None or not sys.stdout.isatty():
        click.echo(text, nl=False)
        return
    ctx.exit(subprocess.run([viewer, "-l", "-"], input=text.encode()).returncode)
