"""When a cron expression is due next, without the scheduler: `status` has no time to import it."""

from datetime import UTC, datetime, timedelta

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_WEEKDAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_FIELDS = 5
_DAYS_AHEAD = 366 * 8 + 1  # a leap day comes at least that often


def next_run(cron: str, now: datetime) -> datetime | None:
    """The first minute after `now` (UTC) that the expression names.

    None where there is none soon, and for forms that only the scheduler itself knows.
    """
    fields = cron.lower().split()
    if len(fields) != _FIELDS:
        return None
    try:
        minutes = sorted(_values(fields[0], 0, 59))
        hours = sorted(_values(fields[1], 0, 23))
        days = _values(fields[2], 1, 31)
        months = _values(fields[3], 1, 12, _MONTHS)
        weekdays = _values(fields[4], 0, 6, _WEEKDAYS)
    except ValueError:
        return None
    first = now.astimezone(UTC).replace(second=0, microsecond=0) + timedelta(minutes=1)
    midnight = first.replace(hour=0, minute=0)
    for ahead in range(_DAYS_AHEAD):
        day = midnight + timedelta(days=ahead)
        if day.day in days and day.month in months and day.weekday() in weekdays:
            times = (day.replace(hour=hour, minute=minute) for hour in hours for minute in minutes)
            if found := next((time for time in times if time >= first), None):
                return found
    return None


def _values(field: str, low: int, high: int, names: tuple[str, ...] = ()) -> set[int]:
    found: set[int] = set()
    for part in field.split(","):
        span, _, step = part.partition("/")
        start, _, stop = span.partition("-")
        if start == "*":
            first, last = low, high
        else:
            first = _number(start, low, names)
            # "5/10" runs on to the end of the field, "5" is 5 alone.
            last = _number(stop, low, names) if stop else (high if step else first)
        if not low <= first <= last <= high:
            raise ValueError(f"{part} lies outside {low}-{high}")
        found.update(range(first, last + 1, int(step or 1)))
    return found


def _number(text: str, low: int, names: tuple[str, ...]) -> int:
    return names.index(text) + low if text in names else int(text)
