"""The command line: find the home, run one command, turn errors into lines and exit codes.

A command is imported when it is called, and its dependencies when it runs: `status` has to answer
at once.
"""

import io
import os
import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from kedit_daemon.cli.context import CliContext, find_version
from kedit_daemon.home import PROGRAM_NAME, Home
from kedit_daemon.system.sanitize import clean_text
from memory.errors import EXIT_USAGE, KeditError

_COMMANDS_PACKAGE = "kedit_daemon.cli.commands"
COMMAND_PATHS = {
    "init": "home:init",
    "run": "home:run",
    "submit": "submit:submit",
    "status": "read:status",
    "facts": "read:facts",
    "show": "read:show",
    "ask": "act:ask",
    "flush": "act:flush",
    "audit": "act:audit",
    "consolidate": "act:consolidate",
    "revert": "act:revert",
    "dismiss": "dismiss:dismiss",
    "log": "log:log",
    "calibrate": "calibrate:calibrate",
    "export": "export:export",
    "backup": "backup:backup",
    "restore": "backup:restore",
    "bench": "bench:bench",
    "doctor": "home:doctor",
    "demo": "home:demo",
    "completion": "shell:completion",
    "man": "shell:man",
}


class LazyGroup(click.Group):
    """A group that imports a command when it is called, and reports its errors."""

    def make_context(self, *args: Any, **extra: Any) -> click.Context:
        """Parse the options of the group itself; report a wrong one as any other error."""
        try:
            return super().make_context(*args, **extra)
        except click.UsageError as error:
            _print_usage_error(error)
            raise click.exceptions.Exit(EXIT_USAGE) from error

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order of a first day's work."""
        return list(COMMAND_PATHS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMAND_PATHS:
            return None
        module, attribute = COMMAND_PATHS[cmd_name].split(":")
        command: click.Command = getattr(import_module(f"{_COMMANDS_PACKAGE}.{module}"), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; an unknown one is compared with those not imported, too."""
        try:
            return super().resolve_command(ctx, args)
        except click.NoSuchCommand as error:
            raise click.NoSuchCommand(
                error.command_name, possibilities=COMMAND_PATHS, ctx=ctx
            ) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error becomes a message, a hint and an exit code."""
        debug = bool(ctx.params.get("debug"))
        try:
            return super().invoke(ctx)
        except KeditError as error:
            _print_traceback(debug)
            _print_error(error.code, str(error), error.hint)
            ctx.exit(error.exit_code)
        except click.UsageError as error:
            _print_usage_error(error)
            ctx.exit(EXIT_USAGE)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click handles these
        except UnicodeEncodeError:
            # File names may be any bytes and are accepted; the database holds nothing like them.
            _print_traceback(debug)
            _print_error("usage", "an argument is not valid UTF-8", "write it in UTF-8")
            ctx.exit(EXIT_USAGE)
        except Exception as error:
            _print_traceback(debug)
            ctx.exit(_print_unexpected_error(error, ctx.find_object(CliContext), debug))


def _print_unexpected_error(error: Exception, session: CliContext | None, debug: bool) -> int:
    """Report an error that no command expects; return the exit code."""
    from kedit_daemon.system.disk import describe_disk_error

    known = describe_disk_error(error, session.home.root if session else Path())
    if known is not None:
        _print_error(known.code, str(known), known.hint)
        return known.exit_code
    message = f"{type(error).__name__}: {error}".partition("\n")[0]
    _print_error("unexpected", message, "" if debug else "run with --debug")
    return 1


def _print_traceback(debug: bool) -> None:
    if debug:
        import traceback

        click.echo(clean_text(traceback.format_exc(), lines=True), err=True, nl=False)


def _print_usage_error(error: click.UsageError) -> None:
    message, suggestion = error.format_message(), ""
    if isinstance(error, click.NoSuchCommand | click.NoSuchOption):
        message = error.message
        suggestion = f"did you mean {error.possibilities[0]}? " if error.possibilities else ""
    command = error.ctx.command_path if error.ctx else PROGRAM_NAME
    _print_error("usage", message[:1].lower() + message[1:], f"{suggestion}see {command} --help")


def _print_error(code: str, message: str, hint: str) -> None:
    """Print an error and its remedy, a line each; scripts read the code."""
    mark = click.style(f"error[{code}]:", fg="red")
    for line in message.splitlines() or [""]:
        click.echo(f"{mark} {clean_text(line)}", err=True)
    if hint:
        click.echo(f"{click.style('hint:', fg='yellow')} {clean_text(hint)}", err=True)


def _print_version(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        click.echo(f"{PROGRAM_NAME} {find_version() or '(not installed)'}")
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
    option = "" if folder is None else f" --home {shlex.quote(str(folder))}"
    ctx.obj = CliContext(home, os.environ, PROGRAM_NAME + option)


def main() -> None:
    """Run the command line; the entry point of the installed program."""
    # Set before torch is loaded: its threads would wait for one another by spinning, and an edit
    # takes more than ten times as long where another process wants the same core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character must not end the command.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    cli(prog_name=PROGRAM_NAME)
