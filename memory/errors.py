"""Errors that users see: a message, a code for scripts, a remedy, and an exit code.

A class of its own is for an error that a caller handles or that has an exit code of its own. All
others are a `KeditError` with a code from the table.
"""

from typing import ClassVar

EXIT_BAD_CONFIG, EXIT_TRY_AGAIN, EXIT_NOT_RUNNING, EXIT_USAGE = 78, 75, 3, 2

EXIT_CODES = {
    **dict.fromkeys(
        (
            *(
                "backup",
                "bad-file",
                "bad-picture",
                "bad-reply",
                "bad-request",
                "calibration",
                "corrupt",
                "demo",
            ),
            *("disk-full", "duplicate", "empty", "exists", "export", "failed", "foreign-form"),
            *("host", "in-use", "io", "model", "nested-transaction", "no-backup"),
            *("no-chat-template", "no-facts", "no-home", "no-matplotlib", "no-permission"),
            *("no-terms", "no-transaction"),
            *("non-finite", "out-of-memory", "pilot", "publish", "rank", "rejected", "restore"),
            *("singular", "statistics", "stopping", "too-large", "too-long", "unexpected"),
            *("unknown-fact", "unknown-generation", "unreadable", "unsupported", "unwritable"),
            "work",
        ),
        1,
    ),
    "usage": EXIT_USAGE,
    "not-running": EXIT_NOT_RUNNING,
    **dict.fromkeys(("busy", "loading", "timeout"), EXIT_TRY_AGAIN),
    **dict.fromkeys(("bad-config", "config", "damaged", "newer-database", "site"), EXIT_BAD_CONFIG),
}
"""Exit code of a command by the code of the error that ends it."""


class KeditError(Exception):
    """An error with a reason that a person can act on.

    `code` is a stable word from `EXIT_CODES`, `hint` the remedy, `exit_code` the command's.
    """

    code: str = "failed"
    exit_code: int = 0
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, code: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.code = code or self.code
        self.hint = hint or self.default_hint
        self.exit_code = self.exit_code or EXIT_CODES[self.code]


class OutOfMemory(KeditError):
    """Memory of the machine or of the device ran out; smaller work may find enough."""

    code = "out-of-memory"
    default_hint = "give it more memory, or let it do less at once: [flush] and [side] batch_facts"


class Stopping(KeditError):
    """A request to stop the process; it ends long work."""

    code = "stopping"


class Damaged(KeditError):
    """A database whose content is inconsistent: it is not used, a backup has to be restored."""

    code = "damaged"
    default_hint = "put a backup back: kedit-daemon restore BACKUP --replace"

    def __init__(self, part: str, damage: str) -> None:
        super().__init__(f"{part} is damaged: {damage}")
        self.part, self.damage = part, damage


class Unsolvable(KeditError):
    """A solve that fails because of the facts in it."""


class NotFinite(Unsolvable):
    """A NaN or an infinity where there must be none."""

    code = "non-finite"


HINT_VISION = "use a vision-language model: set `model` in config.toml of a home of its own"


class BadPicture(KeditError):
    """A picture that is broken, too large, or none."""

    code = "bad-picture"


class Singular(Unsolvable):
    """A system of equations without a unique solution."""

    code = "singular"


class Rejected(KeditError):
    """A fact that cannot be edited as it is; a retry does not help."""

    code = "rejected"


class NoHome(KeditError):
    """A home, or a part of it, that is missing or cannot be made."""

    code = "no-home"


class NotInitialised(NoHome):
    """A home without settings."""

    exit_code = EXIT_BAD_CONFIG


class Unreadable(KeditError):
    """A file or database that cannot be read."""

    code = "unreadable"


class UnusableModel(KeditError):
    """A model that the daemon cannot start with."""

    code = "model"
    exit_code = EXIT_BAD_CONFIG


class UnsupportedModel(UnusableModel):
    """A model of an architecture that is not supported."""

    code = "unsupported"


class RestoreCutOff(KeditError):
    """A home whose restore was interrupted and has to be run again first."""

    code = "restore"
    exit_code = EXIT_BAD_CONFIG


class WorkPaused(KeditError):
    """A refusal of work while the disk is full; the daemon resumes by itself."""

    code = "disk-full"
    exit_code = EXIT_TRY_AGAIN


class NotRunning(KeditError):
    """No daemon answers."""

    code = "not-running"
    default_hint = "kedit-daemon run"


class BadRequest(KeditError):
    """A request that no server of this kind would answer."""

    code = "bad-request"


class RefusedByDaemon(KeditError):
    """An error that the running daemon reported, with its code and exit code."""

    def __init__(self, message: str, code: str, hint: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(message, code=code, hint=hint)


def ends_daemon(error: BaseException) -> bool:
    """Check that an error ends the daemon, so that no fact, request or job is to blame."""
    return isinstance(error, Stopping | Damaged)
