"""When a verdict is acted on: not again and again, and not without end.

Consolidating has hysteresis: once done, it waits until the figures have been clearly below their
limits (see `Thresholds.eased`). Every act waits for a cool-down, and a day has a budget of acts. A
figure that is not finite waits for nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from policies.stability import Action

DAY = timedelta(days=1)


@dataclass(frozen=True)
class Restraint:
    """Seconds between two acts, and how many a day may have."""

    cool_down: float
    budget: int


@dataclass(frozen=True)
class Acted:
    """An act of an audit, and when: ISO-8601 UTC."""

    at: str
    action: str


def held_back(
    action: Action, acts: Sequence[Acted], armed: bool, now: str, restraint: Restraint
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
    if ages and ages[-1].total_seconds() < restraint.cool_down:
        left = restraint.cool_down - ages[-1].total_seconds()
        return f"the last act is not long ago: {left:.0f} s to go"
    if sum(age < DAY for age in ages) >= restraint.budget:
        return f"{restraint.budget} acts in a day are enough: a person should look"
    return None
