import pytest

from policies.cooldown import Cooldown, PastAction, explain_hold
from policies.health_limits import Action

COOLDOWN = Cooldown(min_seconds=600, daily_budget=3)
NOW = "2026-01-02T12:00:00.000Z"


def at(clock: str, action: str = "revert") -> PastAction:
    return PastAction(f"2026-01-{clock}:00.000Z", action)


def held(action: Action, *acts: PastAction, armed: bool = True) -> str | None:
    return explain_hold(action, acts, armed, NOW, COOLDOWN)


@pytest.mark.parametrize("action", [Action.KEEP, Action.WARN])
def test_nothing_is_done_where_nothing_is_asked_for(action: Action) -> None:
    assert held(action) == "no action is needed"


@pytest.mark.parametrize("action", [Action.CONSOLIDATE, Action.REVERT])
def test_an_act_waits_for_the_cool_down_of_the_one_before(action: Action) -> None:
    assert held(action) is None
    assert held(action, at("02T11:50")) is None
    assert held(action, at("02T11:55")) == "the last action is too recent: 300 s to go"


def test_a_day_has_a_budget() -> None:
    today = [at("01T12:01"), at("02T02:00"), at("02T11:00")]
    assert held(Action.REVERT, *today) == "3 actions in a day are enough: a person should look"
    assert held(Action.REVERT, at("01T12:00"), *today[1:]) is None
    assert held(Action.REVERT, at("01T10:00"), *today[1:]) is None


def test_consolidating_waits_until_it_has_been_clearly_well() -> None:
    assert "not been clearly healthy" in str(held(Action.CONSOLIDATE, armed=False))
    assert held(Action.REVERT, armed=False) is None
