"""When a verdict is acted on: not again and again, and not without end.

Consolidating has hysteresis: once done, it waits until the figures have been clearly below their
limits (see `Thresholds.ease_limits`). Every act waits for a cool-down, and a day has a budget of
acts. A figure that is not finite waits for nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from policies.stability import Action

ONE_DAY = timedelta(days=1)


@dataclass(frozen=True)
class Cooldown:
    """Seconds between two acts, and how many a day may have."""

    min_seconds: float
    daily_budget: int


@dataclass(frozen=True)
class PastAction:
    """An act of an audit, and when: ISO-8601 UTC."""

    at: str
    action: str


def explain_hold(
    action: Action, acts: Sequence[PastAction], armed: bool, now: str, restraint: Cooldown
) -> str | None:
    """Why an act that a verdict asks for is not done now; None where it is.

    acts: those of the past, the newest last. armed: whether the figures have been clearly below
    their limits since the last consolidation.
    """
    if action < Action.CONSOLIDATE:
        return "nothing is asked for"
    if action is Action.CONSOLIDATE and not armed:
        return "it was consolidated, and has not been clearly well since"
    today = datetime.fromisoformat(now)
    ages = [today - datetime.fromisoformat(act.at) for act in acts]
    if ages and ages[-1].total_seconds() < restraint.min_seconds:
        left = restraint.min_seconds - ages[-1].total_seconds()
        return f"the last act is not long ago: {left:.0f} s to go"
    if sum(age < ONE_DAY for age in ages) >= restraint.daily_budget:
        return f"{restraint.daily_budget} acts in a day are enough: a person should look"
    return None
