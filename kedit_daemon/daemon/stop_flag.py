"""The flag by which a signal's handler stops the daemon."""


class StopFlag:
    """A flag without a lock, so that a signal handler can set it whatever code it interrupts."""

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        """Request the stop."""
        self._set = True

    def is_set(self) -> bool:
        """Check whether the stop has been requested."""
        return self._set
