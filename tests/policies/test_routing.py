from dataclasses import replace
from typing import Any

import pytest
from editing_home import seat

from memory.db.rows import StoredFact
from memory.facts import OPEN_STATES, FactState
from policies.routing import (
    Route,
    choose_route,
    find_flush_reason,
    find_older_in_slot,
    is_for_batch,
)

NOW = "2026-01-01T00:00:00Z"
ENDS = [s for s in FactState if s not in OPEN_STATES]


def stored(**changes: Any) -> StoredFact:
    fact = StoredFact(
        seat(1),
        1,
        FactState.RECEIVED,
        None,
        None,
        False,
        None,
        "a.jsonl",
        NOW,
        NOW,
        0,
        None,
        None,
        None,
    )
    return replace(fact, **changes)


OVER = seat(1, valid_until="2020-01-01T00:00:00Z")


@pytest.mark.parametrize("state", OPEN_STATES)
def test_a_fact_that_has_not_ended_is_a_duplicate_or_amended(state: FactState) -> None:
    decision = choose_route(stored(state=state, fact=OVER), OVER, NOW, 1000, 1)
    assert decision.route is Route.DUPLICATE
    assert str(state) in decision.reason
    decision = choose_route(stored(state=state), replace(OVER, tags=("x",)), NOW, 1000, 1)
    assert decision.route is Route.AMEND
    assert decision.reason == "valid_until, tags"


@pytest.mark.parametrize("state", ENDS)
def test_a_fact_that_has_ended_may_come_back(state: FactState) -> None:
    assert choose_route(stored(state=state), seat(1), NOW, 1, 64).route is Route.SIDE


@pytest.mark.parametrize(
    ("until", "route"),
    [
        ("2025-12-31T23:59:59Z", Route.REJECT),
        (NOW, Route.REJECT),
        ("2026-01-01T00:00:01Z", Route.SIDE),
        (None, Route.SIDE),
    ],
)
def test_a_fact_whose_time_is_over_is_rejected(until: str | None, route: Route) -> None:
    assert choose_route(None, seat(1, valid_until=until), NOW, 1, 64).route is route


@pytest.mark.parametrize(
    ("in_file", "route"), [(63, Route.SIDE), (64, Route.BATCH), (65, Route.BATCH)]
)
def test_facts_of_a_large_file_go_straight_to_a_batch(in_file: int, route: Route) -> None:
    assert choose_route(None, seat(1), NOW, in_file, 64).route is route
    over, early = seat(1, valid_until=NOW), seat(1, valid_from="2026-01-01T00:00:01Z")
    assert choose_route(None, over, NOW, in_file, 64).route is Route.REJECT
    assert choose_route(None, early, NOW, in_file, 64).route is Route.SCHEDULE
    assert choose_route(None, seat(1, valid_from=NOW), NOW, in_file, 64).route is route


@pytest.mark.parametrize(
    ("direct", "attempts", "batch"),
    [
        (False, 0, False),
        (False, 1, True),
        (False, 2, False),
        (True, 0, True),
        (True, 1, False),
        (True, 2, True),
    ],
)
def test_after_each_failure_the_other_tier_is_tried(
    direct: bool, attempts: int, batch: bool
) -> None:
    assert is_for_batch(stored(direct=direct, attempts=attempts)) is batch


def test_only_active_facts_that_came_before_are_older() -> None:
    new = stored(fact=seat(1, "Oslo"), seq=5)
    before = [
        stored(seq=n + 1, state=s) for n, s in enumerate((FactState.RECEIVED, FactState.LIVE_SIDE))
    ]
    before.append(stored(seq=4, state=FactState.LIVE_WEIGHTS))
    after = stored(seq=6, state=FactState.LIVE_SIDE)
    ended = [stored(seq=3, state=state) for state in ENDS]
    assert find_older_in_slot(new, [*before, new, after, *ended]) == before
    assert find_older_in_slot(new, []) == []


@pytest.mark.parametrize(
    ("waiting", "live", "age", "said"),
    [
        (0, 0, 0.0, None),
        (0, 9, 59.9, None),
        (0, 10, 0.0, "10 facts in the side memory"),
        (0, 1, 60.0, "for 60 s"),
        (0, 0, 1e9, None),
        (2, 0, 0.0, "2 facts came for a batch"),
    ],
)
def test_a_flush_is_due_by_request_number_or_age(
    waiting: int, live: int, age: float, said: str | None
) -> None:
    reason = find_flush_reason([stored()] * waiting, live, age, 10, 60.0)
    assert (reason is None) if said is None else (reason is not None and said in reason)
