"""The manual page, as man(7) source, rendered from click's own commands."""

import inspect
import re
from collections.abc import Iterable, Iterator

import click

from kedit_daemon.cli.context import find_version
from kedit_daemon.home import PROGRAM_NAME

_FILES = (
    ("HOME/config.toml", "The settings, with comments; written by init."),
    ("HOME/inbox/", "Files of facts are dropped here. What is taken in goes to done/."),
    ("HOME/inbox/failed/", "Files with records that state no fact, each with a list of errors."),
    ("HOME/state/kedit.db", "The SQLite database: the only truth."),
    ("HOME/state/audit.head", "The newest link of the log's chain, kept outside the database."),
    ("HOME/review.yaml", "A review desk: datasette HOME/state/kedit.db -m HOME/review.yaml"),
)
_ENVIRONMENT = (
    ("KEDIT_HOME", "The home, unless --home is given. Else $STATE_DIRECTORY, as systemd sets"
     " it, else the folder kedit-daemon in $XDG_STATE_HOME or ~/.local/state."),
    ("KEDIT_SECTION_KEY", "Overrides a setting of config.toml, such as KEDIT_SCHEDULE_AUDIT."),
    ("NO_COLOR", "Turns colours off, when it is not empty."),
)  # fmt: skip
_EXIT_CODES = (
    ("0", "Done."),
    ("1", "Failed."),
    ("2", "Wrong usage."),
    ("3", "The daemon is not running."),
    ("4", "Something needs attention."),
    ("75", "Try again: another daemon holds the home."),
    ("78", "The configuration is wrong."),
)


def render_page(root: click.Context) -> str:
    """Return the whole page; `root` is the context of the whole command line."""
    group = root.command
    title = _escape_roff(f"{PROGRAM_NAME} {find_version()}".strip())
    usage = " ".join(group.collect_usage_pieces(root))
    lines = [
        f'.TH {PROGRAM_NAME.upper()} 1 "" "{title}" "User Commands"',
        *(".nh", ".ad l"),  # names stay whole, and lines even
        *(".SH NAME", rf"{PROGRAM_NAME} \- {_escape_roff(_first_sentence(group))}"),
        *(".SH SYNOPSIS", rf".B {PROGRAM_NAME}", _escape_roff(usage)),
        *(".SH DESCRIPTION", *_render_prose(group.help or "")),
        *(".SH OPTIONS", *_render_options(root)),
        ".SH COMMANDS",
        *(line for context in _iter_contexts(root) for line in _render_command(context)),
        *(".SH FILES", *_render_pairs(_FILES)),
        *(".SH ENVIRONMENT", *_render_pairs(_ENVIRONMENT)),
        *(".SH EXIT STATUS", *_render_pairs(_EXIT_CODES)),
    ]
    return "\n".join(lines) + "\n"


def _iter_contexts(parent: click.Context) -> Iterator[click.Context]:
    """Yield the contexts of all commands, each group before its own."""
    if not isinstance(parent.command, click.Group):
        return
    for name in parent.command.list_commands(parent):
        command = parent.command.get_command(parent, name)
        if command is not None:
            settings = command.context_settings
            context = click.Context(command, info_name=name, parent=parent, **settings)
            yield context
            yield from _iter_contexts(context)


def _render_command(context: click.Context) -> Iterator[str]:
    words = context.command_path.removeprefix(f"{PROGRAM_NAME} ")
    usage = " ".join(context.command.collect_usage_pieces(context))
    yield f".SS {_escape_roff(f'{words} {usage}'.strip())}"
    yield from _render_prose(context.command.help or "")
    yield from _render_options(context)


def _render_options(context: click.Context) -> Iterator[str]:
    for parameter in context.command.get_params(context):
        record = parameter.get_help_record(context)
        # Arguments are explained in the text; --help is explained once.
        if record is None or not record[1] or (context.parent and "--help" in parameter.opts):
            continue
        yield from _render_pairs([record])


def _render_pairs(pairs: Iterable[tuple[str, str]]) -> Iterator[str]:
    for name, text in pairs:
        # A line may be broken between two choices.
        name = _escape_roff(name).replace("|", r"|\:")
        yield from (".TP", f".B {name}", _escape_roff(text))


def _render_prose(help: str) -> Iterator[str]:
    """Yield the paragraphs as click has them: one that follows \\b keeps its lines."""
    for number, block in enumerate(re.split(r"\n\s*\n", inspect.cleandoc(help))):
        lines = [line.rstrip() for line in block.splitlines()]
        if number:
            yield ".PP"
        if lines[0].strip() != "\b":
            yield _escape_roff(" ".join(line.strip() for line in lines))
            continue
        yield ".nf"
        yield from (_escape_roff(line) for line in lines[1:])
        yield ".fi"


def _first_sentence(command: click.Command) -> str:
    text = " ".join((command.help or "").split())
    return re.split(r"[.:](?= |$)", text)[0]


def _escape_roff(text: str) -> str:
    """Escape everything that roff would act on."""
    safe = text.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{safe}" if safe.startswith((".", "'")) else safe
