"""The demo's report: a miss shows and counts, and what is not judged does not."""

import pytest

from kedit_daemon.demo.report import DemoReport


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def tally(said: list[str]) -> DemoReport:
    return DemoReport(said.append)


def test_a_miss_shows_and_counts(tally: DemoReport, said: list[str]) -> None:
    tally.record_check("this holds", True)
    assert tally.has_passed
    tally.record_check("this does not", False)
    tally.record_check("and this holds again", True)
    assert not tally.has_passed
    assert [line.split()[0] for line in said] == ["ok", "MISS", "ok"]


def test_a_share_below_the_minimum_is_a_miss(tally: DemoReport, said: list[str]) -> None:
    right = [True] * 4 + [False]
    tally.record_share("are right", right, 0.8)
    assert tally.has_passed
    tally.record_share("are right", right, 0.81)
    assert not tally.has_passed
    assert said == ["   ok   4 of 5 are right", "   MISS 4 of 5 are right"]


def test_a_share_without_a_minimum_is_a_figure(tally: DemoReport, said: list[str]) -> None:
    tally.record_share("are right", [False, False, True], None)
    assert tally.has_passed
    assert said == ["     -  1 of 3 are right (shown, not judged)"]


def test_what_misses_is_shown_with_its_answers(tally: DemoReport, said: list[str]) -> None:
    tally.print_misses([True, False], ["Oslo is in", "Rome is in"], ["a", "b"], ["c", "d"])
    assert said == ["        not: Rome is in …  b  ->  d"]
