"""The life of a fact in the store: it goes live, is replaced, fails, ends, or changes tier.

Methods that write run inside a transaction of the caller.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from memory.db.rows import StoredFact
from memory.db.store import Store
from memory.facts import ACTIVE_STATES, FactState
from policies.capacity import Capacity
from policies.probe import Probe
from policies.routing import find_older_in_slot, is_for_batch

QUARANTINED = "quarantined"  # how the reason of such a fact begins
LIVE_STATE = {"side": FactState.LIVE_SIDE, "weights": FactState.LIVE_WEIGHTS}  # by tier


@dataclass(frozen=True)
class FactRemoval:
    """A fact to take out of its tier, with its state afterwards and the reason."""

    fact: StoredFact
    state: FactState
    reason: str


class Lifecycle:
    """Changes the state of facts."""

    def __init__(self, store: Store, max_attempts: int) -> None:
        self.store, self.max_attempts = store, max_attempts

    def find_superseded(self, fact: StoredFact) -> list[StoredFact]:
        """Find the active facts that this one replaces: same slot, received earlier."""
        return find_older_in_slot(fact, self.store.list_facts(ACTIVE_STATES, slot=fact.fact.slot))

    def find_all_superseded(self, facts: Iterable[StoredFact]) -> set[str]:
        """Return the ids of the active facts that these replace."""
        return {old.id for fact in facts for old in self.find_superseded(fact)}

    def is_replacement(self, fact: StoredFact) -> bool:
        """Check that the fact replaces one in the weights."""
        return any(old.state is FactState.LIVE_WEIGHTS for old in self.find_superseded(fact))

    def mark_live(
        self,
        fact: StoredFact,
        tier: str,
        before: str,
        probe: Probe,
        seconds: float,
        generation: int | None = None,
    ) -> None:
        """Record that a fact is live in a tier. `before`: the answer of the unedited model;
        `seconds`: the fact's share of the edit's time."""
        self.store.change_state(
            fact.id,
            LIVE_STATE[tier],
            tier=tier,
            generation=generation,
            before=before,
            after=probe.answer,
            probe=probe.as_dict(),
        )
        self.store.add_edit(fact.id, tier, generation, seconds, "live", probe.as_dict())

    def end_superseded(self, fact: StoredFact) -> None:
        """End the facts that this one replaces."""
        for old in self.find_superseded(fact):
            self.store.artifacts.drop_side_keys(old.id)
            self.store.change_state(old.id, FactState.SUPERSEDED, reason=f"superseded by {fact.id}")

    def has_failed(self, fact: StoredFact) -> bool:
        """Check that a fact has failed or is quarantined, and nobody has settled that."""
        quarantined = (fact.reason or "").startswith(f"{QUARANTINED}:")
        return fact.state is FactState.FAILED or (fact.state is FactState.REVERTED and quarantined)

    def dismiss(self, fact: StoredFact) -> None:
        """Settle a fact that has failed or is quarantined: it stays out, and needs nobody."""
        reason = f"dismissed by hand; before: {fact.reason}"
        self.store.change_state(fact.id, FactState.REVERTED, reason=reason)

    def reject(self, fact: StoredFact, tier: str, reason: str) -> None:
        """Reject a fact that no tier can learn."""
        self.store.change_state(fact.id, FactState.REJECTED, reason=reason)
        self.store.add_edit(fact.id, tier, None, 0.0, "rejected", None)

    def record_failed_attempt(self, fact: StoredFact, tier: str, reason: str) -> None:
        """Count a failed attempt: a waiting fact tries the other tier, or fails after
        `max_attempts`. A fact that is live in the side memory stays there."""
        self.store.add_edit(fact.id, tier, None, 0.0, "failed", None)
        self.store.db.write_event("edit_failed", fact.id, tier=tier, reason=reason)
        current = self.store.find_fact(fact.id)  # it may have been moved since it was read
        waiting = current is not None and current.state is FactState.RECEIVED
        if waiting and self.store.count_attempt(fact.id) >= self.max_attempts:
            self.store.change_state(fact.id, FactState.FAILED, reason=reason)

    def redirect_to_side(self, facts: Sequence[StoredFact]) -> None:
        """Route facts that wait for a batch to the side memory."""
        for fact in facts:
            current = self.store.find_fact(fact.id)
            if current is not None and is_for_batch(current):
                self.store.send_to_side(fact.id, "sent_beside")

    def redirect_over_capacity(
        self, facts: Sequence[StoredFact], capacity: Capacity | None
    ) -> None:
        """Route facts that wait for a batch to the side memory, because the weights are full."""
        if capacity is None:
            return
        why = {"figure": capacity.figure, "capacity": capacity.facts, "limit": capacity.limit}
        for fact in facts:
            self.store.send_to_side(fact.id, "weights_full", **why)

    def remove_facts(self, removals: Sequence[FactRemoval], answers: Mapping[str, str]) -> None:
        """Take facts out of both tiers. `answers`: what is answered without them, by id."""
        for one in removals:
            fact_id = one.fact.id
            self.store.artifacts.drop_side_keys(fact_id)
            self.store.change_state(fact_id, one.state, reason=one.reason, after=answers[fact_id])

    def restore_facts(
        self, facts: Sequence[StoredFact], generation: int, reason: str, answers: Mapping[str, str]
    ) -> None:
        """Put ended facts back into the weights. `answers`: what is answered with them, by id."""
        for fact in facts:
            self.store.artifacts.drop_side_keys(fact.id)  # it may have been learned there since
            self.store.change_state(
                fact.id,
                FactState.LIVE_WEIGHTS,
                tier="weights",
                generation=generation,
                reason=reason,
                after=answers[fact.id],
            )
