"""When a cron expression is due next, without the scheduler: `status` has no time to import it."""

from datetime import UTC, datetime, timedelta

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_FIELD_COUNT = 5
_MAX_DAYS_AHEAD = 366 * 8 + 1  # a leap day comes at least that often


def find_next_run(cron: str, now: datetime) -> datetime | None:
    """The first minute after `now` (UTC) that the expression names.

    None where there is none soon, and for forms that only the scheduler itself knows.
    """
    fields = cron.lower().split()
    if len(fields) != _FIELD_COUNT:
        return None
    try:
        minutes = sorted(_parse_field(fields[0], 0, 59))
        hours = sorted(_parse_field(fields[1], 0, 23))
        days = _parse_field(fields[2], 1, 31)
        months = _parse_field(fields[3], 1, 12, _MONTHS)
        weekdays = _parse_field(fields[4], 0, 6, _WEEKDAYS)
    except ValueError:
        return None
    first = now.astimezone(UTC).replace(second=0, microsecond=0) + timedelta(minutes=1)
    midnight = first.replace(hour=0, minute=0)
    for ahead in range(_MAX_DAYS_AHEAD):
        day = midnight + timedelta(days=ahead)
        if day.day in days and day.month in months and day.weekday() in weekdays:
            times = (day.replace(hour=hour, minute=minute) for hour in hours for minute in minutes)
            if found := next((time for time in times if time >= first), None):
                return found
    return None


def _parse_field(field: str, low: int, high: int, names: tuple[str, ...] = ()) -> set[int]:
    found: set[int] = set()
    for part in field.split(","):
        span, _, step = part.partition("/")
        start, _, stop = span.partition("-")
        if start == "*":
            first, last = low, high
        else:
            first = _parse_number(start, low, names)
            # "5/10" runs on to the end of the field, "5" is 5 alone.
            last = _parse_number(stop, low, names) if stop else (high if step else first)
        if not low <= first <= last <= high:
            raise ValueError(f"{part} lies outside {low}-{high}")
        found.update(range(first, last + 1, int(step or 1)))
    return found


def _parse_number(text: str, low: int, names: tuple[str, ...]) -> int:
    return names.index(text) + low if text in names else int(text)
