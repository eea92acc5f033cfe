"""Timestamps as text: one form in UTC, so that they sort as text."""

from datetime import UTC, datetime


def format_utc(time: datetime, timespec: str = "milliseconds") -> str:
    """Format a time as ISO-8601 in UTC: 2026-01-31T12:00:00.000Z, or in whole `seconds`."""
    return time.astimezone(UTC).isoformat(timespec=timespec).replace("+00:00", "Z")
