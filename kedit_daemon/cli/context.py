"""What the commands share: the home they work on, JSON, the database, the running daemon."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from kedit_daemon.home import Home
from memory.canonical_json import replace_non_finite
from memory.errors import KeditError

if TYPE_CHECKING:
    import sqlite3

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass(frozen=True)
class CliContext:
    """One call of the command line."""

    home: Home
    environ: Mapping[str, str]
    program: str
    """How to call this program again for the same home."""


pass_cli_context = click.make_pass_decorator(CliContext)


def add_json_option(command: Command) -> Command:
    """`--json`, which every reading command takes."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, with stable keys.")(
        command
    )


def add_dry_run_option(command: Command) -> Command:
    """`--dry-run`, which every changing command takes."""
    return click.option("--dry-run", is_flag=True, help="Only say what would happen.")(command)


def print_json(value: Any, indent: int | None = 2) -> None:
    """JSON in plain ASCII, so that no terminal obeys what is in it; what JSON lacks is a word."""
    click.echo(json.dumps(replace_non_finite(value), indent=indent, allow_nan=False))


def call_daemon(session: CliContext, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The running daemon's reply, however long it takes; a KeditError when it refuses."""
    from kedit_daemon.control import send_request

    if sys.stderr.isatty():
        click.echo(f"{name}: waiting for the daemon ...", err=True)
    return send_request(session.home.socket_file, name, arguments)


def unknown_fact_error(session: CliContext, conn: "sqlite3.Connection", name: str) -> KeditError:
    """That no fact has this name, and which one may be meant."""
    from memory.db.queries import find_similar_ids

    listing = f"list them with: {session.program} facts"
    meant = find_similar_ids(conn, name)
    hint = f"did you mean {meant[0]}? {listing}" if meant else listing
    return KeditError(f"there is no fact {name}", code="unknown-fact", hint=hint)
