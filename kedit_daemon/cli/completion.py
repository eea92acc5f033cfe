"""What a shell offers when somebody presses Tab.

Asked at every key, so only the database is looked at, and nothing heavy is imported. Whatever is
wrong, nothing is offered: a message would stand in the middle of somebody's line.
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
from memory.facts import ACTIVE_STATES

MAX_OFFERED = 200
HELP_CHARS = 60
# What a shell takes as one word, whatever its quoting.
_PLAIN_WORD = re.compile(r"[\w.@+-]+")


def complete_event_kinds(
    _ctx: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The kinds of events, with what each says."""
    return [
        CompletionItem(kind, help=said)
        for kind, said in EVENT_KINDS.items()
        if kind.startswith(incomplete)
    ]


def complete_facts(
    ctx: click.Context, _parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Ids of facts, the newest first, with what each says; their owners' ids too."""
    return list(_iter_fact_items(ctx, incomplete, active=False))


def complete_active_facts(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Ids of the facts that can be taken out, without those that the line has already."""
    given = ctx.params.get(parameter.name or "") or ()
    return [
        item for item in _iter_fact_items(ctx, incomplete, active=True) if item.value not in given
    ]


def complete_show_names(
    ctx: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """What `show` shows: files in failed/, and facts."""
    files = [name for name in list_failed_files(_find_home(ctx)) if name.startswith(incomplete)]
    named = [
        CompletionItem(n, help="a file that failed") for n in files if _PLAIN_WORD.fullmatch(n)
    ]
    return [*named, *complete_facts(ctx, parameter, incomplete)]


def _find_home(ctx: click.Context) -> Home:
    # The group has not run: its option is read, nothing else has been done.
    return Home.from_environ(ctx.find_root().params.get("folder"), os.environ)


def _iter_fact_items(ctx: click.Context, incomplete: str, active: bool) -> Iterator[CompletionItem]:
    from memory.db.queries import open_readonly

    states = f" AND state IN ({', '.join('?' * len(ACTIVE_STATES))})" if active else ""
    try:
        conn = open_readonly(_find_home(ctx).database_file)
    except (KeditError, sqlite3.Error):
        return
    try:
        rows = conn.execute(
            "SELECT id, external_id, subject, prompt, target FROM facts"
            f" WHERE (substr(id, 1, ?1) = ?2 OR substr(external_id, 1, ?1) = ?2){states}"
            f" ORDER BY seq DESC LIMIT {MAX_OFFERED}",
            (len(incomplete), incomplete, *(ACTIVE_STATES if active else ())),
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

    said = clip_text(format_statement(dict(row)), HELP_CHARS)
    for name in (row["id"], row["external_id"] if incomplete else None):
        if name and name.startswith(incomplete) and _PLAIN_WORD.fullmatch(name):
            yield CompletionItem(name, help=said)
