"""The one error that users see: what happened, and what to do about it."""

STOPPING = "stopping"  # the code of what ends a long edit when the process is told to end
DAMAGED = "damaged"  # that of a database which cannot be used


class KeditError(Exception):
    """Anything that goes wrong for a reason a person can act on.

    `code` is a stable word for scripts, `hint` the remedy, `exit_code` what the command ends with.
    """

    def __init__(
        self, message: str, *, code: str = "failed", hint: str = "", exit_code: int = 1
    ) -> None:
        super().__init__(message)
        self.code = code
        self.hint = hint
        self.exit_code = exit_code


def damage_error(what: str, how: str) -> KeditError:
    """The database says what cannot be: nothing of it is used, and a backup put back."""
    return KeditError(
        f"{what} is damaged: {how}",
        code=DAMAGED,
        hint="put a backup back: kedit-daemon restore BACKUP --replace",
        exit_code=78,
    )


def ends_daemon(error: BaseException) -> bool:
    """Whether the daemon ends with this error: it is asked to, or the database is damaged. It is
    the fault of no fact, request or job."""
    return isinstance(error, KeditError) and error.code in (STOPPING, DAMAGED)
