from datetime import UTC, datetime

import pytest

from kedit_daemon.system.timespec import parse_time

NOW = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("90s", "2026-03-01T11:58:30.000Z"),
        ("2h", "2026-03-01T10:00:00.000Z"),
        ("1w", "2026-02-22T12:00:00.000Z"),
        ("2026-01-31T12:00", "2026-01-31T12:00:00.000Z"),
        ("2026-01-31T12:00+02:00", "2026-01-31T10:00:00.000Z"),
    ],
)
def test_moments(text: str, found: str) -> None:
    assert parse_time(text, NOW) == found


@pytest.mark.parametrize("text", ["", "2x", "yesterday", "999999w", "0001-01-01T00:00+10:00"])
def test_what_is_no_moment(text: str) -> None:
    with pytest.raises(ValueError, match="write ISO-8601"):
        parse_time(text, NOW)
