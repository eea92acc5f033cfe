"""Completion of arguments in a shell.

It runs at every Tab, so it reads only the database and imports nothing heavy. On any error it
offers nothing: a message would appear in the middle of the command line.
"""

import os
import re
import sqlite3
from collections.abc import Iterator

import click
from click.shell_completion import CompletionItem

from kedit_daemon.home import Home
from kedit_daemon.ingest.failed_files import list_failed_files
from kedit_daemon.report.event_kinds import EVENT_KINDS
from memory.errors import KeditError
from memory.facts import OPEN_STATES

MAX_OFFERED = 200
HELP_CHARS = 60
# Words that need no quoting in any shell.
_PLAIN_WORD = re.compile(r"[\w.@+-]+")


def complete_event_kinds(
    _ctx: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return the kinds of events, with their meanings."""
    kinds = EVENT_KINDS.items()
    return [CompletionItem(kind, help=text) for kind, text in kinds if kind.startswith(incomplete)]


def complete_facts(
    ctx: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return ids of facts, the newest first, with their statements; external ids too."""
    return list(_iter_fact_items(ctx, incomplete, active=False))


def complete_active_facts(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return ids of the facts that can be reverted, without those already on the line."""
    given = ctx.params.get(parameter.name or "") or ()
    items = _iter_fact_items(ctx, incomplete, active=True)
    return [item for item in items if item.value not in given]


def complete_show_names(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Return what `show` takes: files in failed/, and ids of facts."""
    files = [
        CompletionItem(name, help="a file that failed")
        for name in list_failed_files(_find_home(ctx))
        if name.startswith(incomplete) and _PLAIN_WORD.fullmatch(name)
    ]
    return [*files, *complete_facts(ctx, parameter, incomplete)]


def _find_home(ctx: click.Context) -> Home:
    # The group itself has not run: only its options have been parsed.
    return Home.from_environ(ctx.find_root().params.get("folder"), os.environ)


def _iter_fact_items(ctx: click.Context, incomplete: str, active: bool) -> Iterator[CompletionItem]:
    from memory.db.queries import open_readonly

    states = f" AND state IN ({', '.join('?' * len(OPEN_STATES))})" if active else ""
    try:
        conn = open_readonly(_find_home(ctx).database_file)
    except (KeditError, sqlite3.Error):
        return
    try:
        rows = conn.execute(
            "SELECT id, external_id, subject, prompt, target FROM facts"
            f" WHERE (substr(id, 1, ?1) = ?2 OR substr(external_id, 1, ?1) = ?2){states}"
            f" ORDER BY seq DESC LIMIT {MAX_OFFERED}",
            (len(incomplete), incomplete, *(OPEN_STATES if active else ())),
        ).fetchall()
    except sqlite3.Error:
        return
    finally:
        conn.close()
    for row in rows:
        yield from _iter_row_items(row, incomplete)


def _iter_row_items(row: sqlite3.Row, incomplete: str) -> Iterator[CompletionItem]:
    from kedit_daemon.report.render import format_statement
    from kedit_daemon.system.sanitize import clip_text

    statement = clip_text(format_statement(dict(row)), HELP_CHARS)
    for name in (row["id"], row["external_id"] if incomplete else None):
        if name and name.startswith(incomplete) and _PLAIN_WORD.fullmatch(name):
            yield CompletionItem(name, help=statement)
