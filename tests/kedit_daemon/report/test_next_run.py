from datetime import UTC, datetime, timedelta

import pytest
from apscheduler.triggers.cron import CronTrigger
from hypothesis import given, settings
from hypothesis import strategies as st

from kedit_daemon.report.next_run import find_next_run

NOW = datetime(2026, 3, 1, 2, 30, 15, tzinfo=UTC)
EXPRESSIONS = (
    "* * * * *",
    "0 * * * *",
    "0 4 * * *",
    "*/7 * * * *",
    "5/20 1,13 * * *",
    "15 3 * * mon",
    "59 23 31 * *",
    "0 0 1 jan *",
    "30 6 * 2-4,10 tue-fri",
    "0 12 29 feb *",
    "10-40/15 */6 1-15 * sat,sun",
)


@given(
    st.sampled_from(EXPRESSIONS),
    st.datetimes(datetime(2020, 1, 1), datetime(2039, 1, 1)).map(lambda t: t.replace(second=30)),
)
@settings(deadline=None)
def test_it_agrees_with_the_scheduler(cron: str, moment: datetime) -> None:
    now = moment.replace(tzinfo=UTC)
    trigger = CronTrigger.from_crontab(cron, timezone=UTC)
    assert find_next_run(cron, now) == trigger.get_next_fire_time(None, now)


def test_the_next_run_comes_after_now() -> None:
    due = NOW.replace(second=0)
    assert find_next_run("* * * * *", due) == due + timedelta(minutes=1)


@pytest.mark.parametrize("cron", ["", "0 4 * *", "x 4 * * *", "61 * * * *", "0 0 last * *"])
def test_what_only_the_scheduler_knows_is_left_to_it(cron: str) -> None:
    assert find_next_run(cron, NOW) is None


def test_a_date_that_never_comes() -> None:
    assert find_next_run("0 0 31 feb *", NOW) is None
