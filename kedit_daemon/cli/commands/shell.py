"""The commands for the shell: completion, and the manual page."""

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
    """Print the script that completes commands, options, states and ids of facts in a shell.

    \b
    Example:
      echo 'source <(kedit-daemon completion bash)' >> ~/.bashrc
      kedit-daemon completion zsh > "${fpath[1]}/_kedit-daemon"
      kedit-daemon completion fish > ~/.config/fish/completions/kedit-daemon.fish
    """
    complete = get_completion_class(shell)
    assert complete is not None, "click knows all three shells"
    variable = f"_{PROGRAM_NAME.replace('-', '_').upper()}_COMPLETE"
    click.echo(complete(ctx.find_root().command, {}, PROGRAM_NAME, variable).source())


@click.command()
@click.pass_context
def man(ctx: click.Context) -> None:
    """Show the manual page; off a terminal, print its source.

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
