"""The command line: finds the home, runs one command, and turns errors into lines and exit codes.

Commands are imported when they are called, and what they need when they run: `status` has to
answer at once.
"""

import io
import os
import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from kedit_daemon.cli.context import CliContext
from kedit_daemon.cli.usage import EXIT_USAGE, Suggesting, explained
from kedit_daemon.home import PROGRAM_NAME, Home
from kedit_daemon.system.sanitize import clean_text
from memory.errors import KeditError

COMMAND_PATHS = {
    "init": "cli.commands.home:init",
    "run": "cli.commands.home:run",
    "submit": "cli.commands.home:submit",
    "status": "cli.commands.read:status",
    "facts": "cli.commands.read:facts",
    "show": "cli.commands.read:show",
    "ask": "cli.commands.act:ask",
    "flush": "cli.commands.act:flush",
    "audit": "cli.commands.act:audit",
    "consolidate": "cli.commands.act:consolidate",
    "revert": "cli.commands.act:revert",
    "log": "cli.commands.log:log",
    "calibrate": "cli.commands.calibrate:calibrate",
    "export": "cli.commands.export:export",
    "backup": "cli.commands.backup:backup",
    "restore": "cli.commands.backup:restore",
    "bench": "cli.commands.bench:bench",
    "doctor": "cli.commands.home:doctor",
    "demo": "cli.commands.home:demo",
    "completion": "cli.commands.shell:completion",
    "man": "cli.commands.shell:man",
}


class LazyGroup(Suggesting):
    """A group that imports a command when it is called, and explains how one ended."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """As click does; our own options may be mistyped, too."""
        try:
            return super().make_context(*args, **extra)
        except click.UsageError as error:
            _print_error("usage", *explained(error))
            raise click.exceptions.Exit(EXIT_USAGE) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of a first day's work."""
        return list(COMMAND_PATHS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in COMMAND_PATHS:
            return None
        module, attribute = COMMAND_PATHS[cmd_name].split(":")
        command: click.Command = getattr(import_module(f"kedit_daemon.{module}"), attribute)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what a person can act on is told, everything else is one line."""
        debug = bool(ctx.params.get("debug"))
        try:
            return super().invoke(ctx)
        except KeditError as error:
            _print_traceback(debug)
            _print_error(error.code, str(error), error.hint)
            ctx.exit(error.exit_code)
        except click.UsageError as error:
            _print_error("usage", *explained(error))
            ctx.exit(EXIT_USAGE)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click has its own ways with these
        except UnicodeEncodeError:
            # Names of files may be any bytes, and are taken; the database holds nothing like them.
            _print_traceback(debug)
            _print_error("usage", "an argument is not valid UTF-8", "write it in UTF-8")
            ctx.exit(EXIT_USAGE)
        except Exception as error:
            from kedit_daemon.system.disk import describe_disk_error

            _print_traceback(debug)
            session = ctx.find_object(CliContext)
            known = describe_disk_error(error, session.home.root if session else Path())
            if known is not None:
                _print_error(known.code, str(known), known.hint)
                ctx.exit(known.exit_code)
            what = f"{type(error).__name__}: {error}".partition("\n")[0]
            _print_error("unexpected", what, "" if debug else "run with --debug")
            ctx.exit(1)


def _print_traceback(debug: bool) -> None:
    if debug:
        import traceback

        click.echo(clean_text(traceback.format_exc(), lines=True), err=True, nl=False)


def _print_error(code: str, message: str, hint: str) -> None:
    """The code is for scripts, and for those who look an error up."""
    mark = click.style(f"error[{code}]:", fg="red")
    for line in message.splitlines() or [""]:
        click.echo(f"{mark} {clean_text(line)}", err=True)
    if hint:
        click.echo(f"{click.style('hint:', fg='yellow')} {clean_text(hint)}", err=True)


def _print_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version

    try:
        number = version(PROGRAM_NAME)
    except PackageNotFoundError:
        number = "(not installed)"
    click.echo(f"{PROGRAM_NAME} {number}")
    ctx.exit()


@click.group(
    PROGRAM_NAME,
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--home",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="The home of the daemon; else $KEDIT_HOME, else the XDG state folder.",
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Print the version and exit.",
)
@click.pass_context
def cli(ctx: click.Context, folder: Path | None, debug: bool) -> None:
    """Keeps the knowledge of a language model current: hand in facts, and the model knows them.

    \b
    Example:
      kedit-daemon init && kedit-daemon run
      kedit-daemon submit facts.jsonl --wait
      kedit-daemon ask "The country that Lake Eyre lies in is"

    Exit codes: 0 done, 1 failed, 2 usage, 3 daemon not running, 4 needs attention,
    75 try again, 78 bad config.
    """
    if os.environ.get("NO_COLOR"):
        ctx.color = False
    home = Home.from_environ(folder, os.environ)
    program = (
        PROGRAM_NAME if folder is None else f"{PROGRAM_NAME} --home {shlex.quote(str(folder))}"
    )
    ctx.obj = CliContext(home, os.environ, program)


def main() -> None:
    """The installed command."""
    # Torch's threads, which are not loaded yet, would wait for one another by spinning: where
    # another process wants the same core, an edit then takes ten times as long and more.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character must not end the command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    cli(prog_name=PROGRAM_NAME)
