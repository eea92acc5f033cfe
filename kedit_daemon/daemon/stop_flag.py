"""The flag by which a signal's handler stops the daemon."""


class StopFlag:
    """An event that nobody waits for, and so without a lock.

    A signal's handler sets it, and may have interrupted code that was about to take such a lock.
    """

    def __init__(self) -> None:
        self._set = False

    def set(self) -> None:
        """Request the stop."""
        self._set = True

    def is_set(self) -> bool:
        """Check whether the stop has been requested."""
        return self._set
