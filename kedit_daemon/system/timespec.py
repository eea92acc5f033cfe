"""Moments as people write them."""

import re
from datetime import UTC, datetime, timedelta

from memory.timestamps import format_utc

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_TIME_AGO = re.compile(r"(\d{1,6})([smhdw])")


def parse_time(text: str, now: datetime) -> str:
    """As the log itself spells moments, so that they compare as text.

    `text` is ISO-8601, taken as UTC where it names no offset, or how long ago, such as 2h. Raises
    ValueError, with what to write instead.
    """
    try:
        if ago := _TIME_AGO.fullmatch(text):
            found = now - timedelta(**{_UNITS[ago[2]]: int(ago[1])})
        else:
            found = datetime.fromisoformat(text)
            found = found.replace(tzinfo=found.tzinfo or UTC)
        return format_utc(found)
    except (ValueError, OverflowError):
        raise ValueError(
            "write ISO-8601 such as 2026-01-31T12:00, taken as UTC, or how long ago, such as 2h"
        ) from None
