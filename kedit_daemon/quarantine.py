"""Quarantine: the facts that make the weights sick are found, named, and taken out of both tiers.

What is innocent stays where it is. A fact in quarantine has ended; it comes back when a person
hands it in again, and its targets are then computed anew.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from kedit_daemon.weights import Weights
from memory.facts import State
from memory.rows import StoredFact
from policies.guilt import Guilt, search
from policies.stability import Action, Verdict

SAID = "quarantined"

Ids = Callable[[Sequence[StoredFact]], Sequence[str]]


class Quarantine:
    """Tries parts of a batch on the weights, and locks up who makes them sick alone."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.store = weights, weights.store

    def sift(self, batch: Sequence[StoredFact], ids: Ids) -> list[tuple[StoredFact, Verdict]]:
        """Who of a batch would make the weights sick all by itself, and how. `ids`: all that is in
        the weights with some of the batch.

        Where even the fact that asks most of them is well alone, no single one is to blame: there
        are just too many.
        """
        if self.weights.verdict_on(ids(batch)).action < Action.REVERT:
            return []
        worst = max(batch, key=lambda fact: self.weights.strain(fact.id))
        return self.search(batch, ids).guilty if self._sick(worst) else []

    def search(self, suspects: Sequence[StoredFact], ids: Ids) -> Guilt[StoredFact]:
        """Who of the suspects is to blame, of weights that are sick with all of them. Those who
        ask most of the weights are tried last, so that they are found to be too many, if any."""
        ranked = sorted(suspects, key=lambda fact: self.weights.strain(fact.id))
        with self.weights.candidates():
            judged = partial(self._judged, ids)
            return search(ranked, judged, self._alone, Action.REVERT)

    def _judged(self, ids: Ids, some: Sequence[StoredFact]) -> Verdict:
        return self.weights.verdict_on(ids(some))

    def _sick(self, fact: StoredFact) -> bool:
        return self._alone(fact).action >= Action.REVERT

    def _alone(self, fact: StoredFact) -> Verdict:
        return self.weights.verdict_on([fact.id])

    def lock_up(self, guilty: Sequence[tuple[StoredFact, Verdict]]) -> None:
        """End the guilty, each with the measures that condemned it."""
        if not guilty:
            return
        why: Mapping[str, str] = {
            fact.id: f"{SAID}: alone it makes the weights sick: {'; '.join(verdict.reasons)}"
            for fact, verdict in guilty
        }
        facts = [fact for fact, _ in guilty]
        self.weights.take_out(facts, State.REVERTED, SAID, why=why)
        with self.store.transaction():
            for fact, verdict in guilty:
                self.store.drop_terms(fact.id)
                self.store.event(SAID, fact.id, reasons=list(verdict.reasons))
