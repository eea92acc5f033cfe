"""What is said to somebody who mistyped a command: what is wrong, what may be meant, where help is.

Click says so in words of its own; here they become the two lines that every error has.
"""

from difflib import get_close_matches

import click

EXIT_USAGE = 2


class Suggesting(click.Group):
    """A group that knows which of its commands somebody meant."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with a suggestion where there is no such command."""
        name, names = args[0], self.list_commands(ctx)
        if name in names or name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        raise UnknownCommand(f"there is no command {name}", ctx, get_close_matches(name, names, 1))


class UnknownCommand(click.UsageError):
    """A mistyped command, and those that are spelled like it."""

    def __init__(self, message: str, ctx: click.Context, near: list[str]) -> None:
        super().__init__(message, ctx)
        self.near = near


def explained(error: click.UsageError) -> tuple[str, str]:
    """The error and its hint, a line each."""
    near: list[str] = []
    message = error.format_message()
    if isinstance(error, UnknownCommand):
        near = error.near
    elif isinstance(error, click.NoSuchOption):
        message = f"there is no option {error.option_name}"
        near = get_close_matches(error.option_name, _options(error.ctx), 1)
    meant = f"did you mean {near[0]}? " if near else ""
    called = error.ctx.command_path if error.ctx else "kedit-daemon"
    return message[:1].lower() + message[1:], f"{meant}see {called} --help"


def _options(ctx: click.Context | None) -> list[str]:
    if ctx is None:
        return []
    return [name for parameter in ctx.command.get_params(ctx) for name in parameter.opts]
