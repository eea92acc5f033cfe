"""The manual page, as man(7) source, made from click's own commands: it cannot go stale."""

import inspect
import re
from collections.abc import Iterator
from importlib import metadata

import click

from kedit_daemon.home import NAME

_FILES = (
    ("HOME/config.toml", "The settings, with comments; written by init."),
    ("HOME/inbox/", "Files of facts are dropped here. What is taken in goes to done/."),
    ("HOME/inbox/failed/", "Files with records that state no fact, each beside what is wrong."),
    ("HOME/state/kedit.db", "The SQLite database: the only truth."),
    ("HOME/state/audit.head", "The newest link of the log's chain, kept outside the database."),
    ("HOME/review.yaml", "A review desk: datasette HOME/state/kedit.db -m HOME/review.yaml"),
)
_ENVIRONMENT = (
    ("KEDIT_HOME", "The home, where --home is not given. Else $STATE_DIRECTORY, as systemd sets"
     " it, else the folder kedit-daemon in $XDG_STATE_HOME or ~/.local/state."),
    ("KEDIT_SECTION_KEY", "Overrides a setting of config.toml, such as KEDIT_SCHEDULE_AUDIT."),
    ("NO_COLOR", "No colours, when it is not empty."),
)  # fmt: skip
_ENDS = (
    ("0", "Done."),
    ("1", "Failed."),
    ("2", "Wrong usage."),
    ("3", "The daemon does not run."),
    ("4", "Something needs a person."),
    ("75", "Try again: another daemon holds the home."),
    ("78", "The configuration is wrong."),
)


def page(root: click.Context) -> str:
    """The whole page; `root` is the context of the whole command line."""
    try:
        version = metadata.version(NAME)
    except metadata.PackageNotFoundError:
        version = ""
    group = root.command
    lines = [
        f'.TH {NAME.upper()} 1 "" "{_escaped(f"{NAME} {version}".strip())}" "User Commands"',
        *(".nh", ".ad l"),  # names stay whole, and lines even
        *(".SH NAME", rf"{NAME} \- {_escaped(_first(group))}"),
        *(".SH SYNOPSIS", rf".B {NAME}", _escaped(" ".join(group.collect_usage_pieces(root)))),
        *(".SH DESCRIPTION", *_prose(group.help or "")),
        *(".SH OPTIONS", *_options(root)),
        ".SH COMMANDS",
        *(line for context in _below(root) for line in _command(context)),
        *(".SH FILES", *_listed(_FILES)),
        *(".SH ENVIRONMENT", *_listed(_ENVIRONMENT)),
        *(".SH EXIT STATUS", *_listed(_ENDS)),
    ]
    return "\n".join(lines) + "\n"


def _below(parent: click.Context) -> Iterator[click.Context]:
    """The contexts of all commands, those of a group behind it."""
    if not isinstance(parent.command, click.Group):
        return
    for name in parent.command.list_commands(parent):
        command = parent.command.get_command(parent, name)
        if command is not None:
            settings = command.context_settings
            context = click.Context(command, info_name=name, parent=parent, **settings)
            yield context
            yield from _below(context)


def _command(context: click.Context) -> Iterator[str]:
    words = context.command_path.removeprefix(f"{NAME} ")
    usage = " ".join(context.command.collect_usage_pieces(context))
    yield f".SS {_escaped(f'{words} {usage}'.strip())}"
    yield from _prose(context.command.help or "")
    yield from _options(context)


def _options(context: click.Context) -> Iterator[str]:
    for parameter in context.command.get_params(context):
        record = parameter.get_help_record(context)
        # Arguments are explained in the text; --help is explained once.
        if record is None or not record[1] or (context.parent and "--help" in parameter.opts):
            continue
        # A line may be broken between two choices.
        yield from (".TP", f".B {_escaped(record[0])}".replace("|", r"|\:"), _escaped(record[1]))


def _listed(pairs: tuple[tuple[str, str], ...]) -> Iterator[str]:
    for name, said in pairs:
        yield from (".TP", f".B {_escaped(name)}", _escaped(said))


def _prose(help: str) -> Iterator[str]:
    """Paragraphs as click takes them: what stands behind \\b keeps its lines."""
    for number, block in enumerate(re.split(r"\n\s*\n", inspect.cleandoc(help))):
        lines = [line.rstrip() for line in block.splitlines()]
        if number:
            yield ".PP"
        if lines[0].strip() != "\b":
            yield _escaped(" ".join(line.strip() for line in lines))
            continue
        yield ".nf"
        yield from (_escaped(line) for line in lines[1:])
        yield ".fi"


def _first(command: click.Command) -> str:
    text = " ".join((command.help or "").split())
    return re.split(r"[.:](?= |$)", text)[0]


def _escaped(text: str) -> str:
    """As text, whatever roff would do with it."""
    safe = text.replace("\\", r"\e").replace("-", r"\-")
    return rf"\&{safe}" if safe.startswith((".", "'")) else safe
