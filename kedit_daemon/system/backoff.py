"""Waiting times between attempts at work that keeps failing."""

import math
from collections.abc import Callable


class Backoff:
    """Doubles the wait after every failure in a row, from `first_seconds` up to `max_seconds`."""

    def __init__(
        self, first_seconds: float, max_seconds: float, monotonic: Callable[[], float]
    ) -> None:
        self._first_seconds, self._max_seconds = first_seconds, max_seconds
        self._monotonic = monotonic
        self._seconds, self._due_at = 0.0, -math.inf

    def record_failure(self) -> float:
        """Return the seconds until the next attempt, which start now."""
        self._seconds = min(2 * self._seconds or self._first_seconds, self._max_seconds)
        self._due_at = self._monotonic() + self._seconds
        return self._seconds

    def is_due(self) -> bool:
        """Check that the wait is over; there is none before the first failure."""
        return self._monotonic() >= self._due_at

    def reset(self) -> None:
        """Forget the failures: an attempt has succeeded, or something else is attempted."""
        self._seconds, self._due_at = 0.0, -math.inf
