"""Restraint of audits: an action is not repeated at once, nor without end.

Consolidating has hysteresis: once done, it waits until the figures have been clearly below their
limits (see `Thresholds.ease_limits`). Every action waits for a cool-down, and a day has a budget of
actions. A figure that is not finite waits for nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from policies.health_limits import Action


@dataclass(frozen=True)
class Cooldown:
    """Seconds between two actions, and the number of actions that a day may have."""

    min_seconds: float
    daily_budget: int


@dataclass(frozen=True)
class PastAction:
    """An action of an audit and its time, ISO-8601 UTC."""

    at: str
    action: str


def explain_hold(
    action: Action, past: Sequence[PastAction], armed: bool, now: str, cooldown: Cooldown
) -> str | None:
    """Return why an action that a verdict asks for has to wait, or None.

    past: earlier actions, the newest last. armed: whether the figures have been clearly below their
    limits since the last consolidation.
    """
    if action < Action.CONSOLIDATE:
        return "no action is needed"
    if action is Action.CONSOLIDATE and not armed:
        return "the weights were consolidated and have not been clearly healthy since"
    time = datetime.fromisoformat(now)
    ages = [time - datetime.fromisoformat(one.at) for one in past]
    if ages and (left := cooldown.min_seconds - ages[-1].total_seconds()) > 0:
        return f"the last action is too recent: {left:.0f} s to go"
    if sum(age < timedelta(days=1) for age in ages) >= cooldown.daily_budget:
        return f"{cooldown.daily_budget} actions in a day are enough: a person should look"
    return None
