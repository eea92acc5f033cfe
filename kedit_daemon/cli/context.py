"""Helpers of all commands: the home they work on, JSON output, requests to the daemon."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kedit_daemon.home import PROGRAM_NAME, Home
from memory.canonical_json import replace_non_finite
from memory.errors import KeditError

if TYPE_CHECKING:
    import sqlite3

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class CliContext:
    """A call of the command line: its home, its environment, its name."""

    home: Home
    environ: Mapping[str, str]
    program: str  # how to call this program again for the same home


pass_cli_context = click.make_pass_decorator(CliContext)


def find_version() -> str:
    """Return the version of the installed program; empty where it is not installed."""
    from importlib import metadata

    try:
        return metadata.version(PROGRAM_NAME)
    except metadata.PackageNotFoundError:
        return ""


def add_json_option(command: Command) -> Command:
    """Add `--json`, which every reading command takes."""
    option = click.option("--json", "as_json", is_flag=True, help="Print JSON, with stable keys.")
    return option(command)


def add_dry_run_option(command: Command) -> Command:
    """Add `--dry-run`, which every changing command takes."""
    return click.option("--dry-run", is_flag=True, help="Only say what would happen.")(command)


def print_json(value: Any, indent: int | None = 2) -> None:
    """Print JSON in plain ASCII, which no terminal acts on; non-finite numbers become words."""
    click.echo(json.dumps(replace_non_finite(value), indent=indent, allow_nan=False))


def call_daemon(session: CliContext, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the running daemon's reply, however long it takes. Raises its refusal."""
    from kedit_daemon.control import send_request

    if sys.stderr.isatty():
        click.echo(f"{name}: waiting for the daemon ...", err=True)
    return send_request(session.home.socket_file, name, arguments)


def unknown_fact_error(session: CliContext, conn: "sqlite3.Connection", name: str) -> KeditError:
    """Return the error for an id that no fact has, with a similar id in its hint."""
    from memory.db.queries import find_similar_ids

    listing = f"list them with: {session.program} facts"
    similar = find_similar_ids(conn, name)
    hint = f"did you mean {similar[0]}? {listing}" if similar else listing
    return KeditError(f"there is no fact {name}", code="unknown-fact", hint=hint)
