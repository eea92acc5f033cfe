"""Routing of facts: into the side memory, a batch, or nowhere; and which ones they supersede."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from memory.db.rows import StoredFact
from memory.facts import ACTIVE_STATES, OPEN_STATES, Fact


class Route(StrEnum):
    """Destination of a fact that has just arrived."""

    SIDE = "side"
    BATCH = "batch"
    DUPLICATE = "duplicate"
    AMEND = "amend"
    SCHEDULE = "schedule"
    REJECT = "reject"


@dataclass(frozen=True)
class RouteDecision:
    """A route and the reason for it."""

    route: Route
    reason: str


def choose_route(
    known: StoredFact | None, fact: Fact, now: str, in_file: int, direct_facts: int
) -> RouteDecision:
    """Route a fact by what is known under its id, its validity, and the size of its file.

    Times are ISO-8601 UTC with a Z, so that they compare as text.
    """
    if known is not None and known.state in OPEN_STATES:
        if known.fact == fact:
            return RouteDecision(Route.DUPLICATE, f"already {known.state}")
        return RouteDecision(Route.AMEND, ", ".join(known.fact.compare_terms(fact)))
    if fact.valid_until is not None and fact.valid_until <= now:
        return RouteDecision(Route.REJECT, f"valid_until {fact.valid_until} has passed")
    if is_early(fact, now):
        return RouteDecision(Route.SCHEDULE, f"valid from {fact.valid_from}")
    if in_file >= direct_facts and fact.picture is None:
        return RouteDecision(Route.BATCH, f"one of {in_file} facts in one file")
    return RouteDecision(Route.SIDE, "live in the side memory first")


def is_early(fact: Fact, now: str) -> bool:
    """Check that a fact is not valid yet."""
    return fact.valid_from is not None and fact.valid_from > now


def is_for_batch(fact: StoredFact) -> bool:
    """Check that a waiting fact is for a batch: by its file, and the other tier after a failure.
    The weights take no fact about a picture: their keys are of names."""
    return fact.fact.picture is None and fact.direct != (fact.attempts % 2 == 1)


def find_older_in_slot(fact: StoredFact, in_slot: Sequence[StoredFact]) -> list[StoredFact]:
    """List the active facts that this one supersedes: same subject and prompt, arrived before."""
    return [other for other in in_slot if other.seq < fact.seq and other.state in ACTIVE_STATES]


def find_flush_reason(
    waiting: Sequence[StoredFact],
    live_side: int,
    oldest_side_age: float,
    flush_facts: int,
    age: float,
) -> str | None:
    """Return why the weights should take a batch now, or None.

    waiting: facts routed straight to a batch. oldest_side_age and age are in seconds.
    """
    if waiting:
        return f"{len(waiting)} facts came for a batch"
    if live_side >= flush_facts:
        return f"{live_side} facts in the side memory"
    if live_side and oldest_side_age >= age:
        return f"the oldest fact has been in the side memory for {oldest_side_age:.0f} s"
    return None
