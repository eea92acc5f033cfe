"""Times as people write them."""

import re
from datetime import UTC, datetime, timedelta

from memory.timestamps import format_utc

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_TIME_AGO = re.compile(r"(\d{1,6})([smhdw])")


def parse_time(text: str, now: datetime) -> str:
    """Return a time in the spelling of the log, so that both compare as text.

    `text` is ISO-8601, in UTC unless it has an offset, or a time ago such as 2h. Raises
    ValueError, which says what to write instead.
    """
    try:
        if ago := _TIME_AGO.fullmatch(text):
            return format_utc(now - timedelta(**{_UNITS[ago[2]]: int(ago[1])}))
        time = datetime.fromisoformat(text)
        return format_utc(time.replace(tzinfo=time.tzinfo or UTC))
    except (ValueError, OverflowError):
        raise ValueError(
            "write ISO-8601 such as 2026-01-31T12:00, taken as UTC, or how long ago, such as 2h"
        ) from None
