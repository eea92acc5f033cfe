"""Quarantine: the facts that make the weights sick are found, named, and taken out of both tiers.

What is innocent stays where it is. A fact in quarantine has ended; it comes back when a person
hands it in again, and its targets are then computed anew.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from kedit_daemon.editing.generations import Leaving, Weights
from memory.db.rows import StoredFact
from memory.facts import State
from policies.culprits import Guilt, search
from policies.stability import Action, Verdict

SAID = "quarantined"

Ids = Callable[[Sequence[StoredFact]], Sequence[str]]


class Quarantine:
    """Tries parts of a batch on the weights, and locks up who makes them sick alone."""

    def __init__(self, weights: Weights, pulse: Callable[[], None]) -> None:
        self.weights, self.store, self.pulse = weights, weights.store, pulse

    def sift(self, batch: Sequence[StoredFact], ids: Ids) -> list[tuple[StoredFact, Verdict]]:
        """Who of a batch would make the weights sick all by itself, and how. `ids`: all that is in
        the weights with some of the batch.

        Where even the fact that asks most of them is well alone, there are taken to be too many,
        and no single one to be to blame.
        """
        if self._judged(ids, batch).action < Action.REVERT:
            return []
        strains = self._strains(batch)
        worst = max(batch, key=lambda fact: strains[fact.id])
        sick = self._alone(worst).action >= Action.REVERT
        return self._search(batch, strains, ids).guilty if sick else []

    def search(self, suspects: Sequence[StoredFact], ids: Ids) -> Guilt[StoredFact]:
        """Who of the suspects is to blame, of weights that are sick with all of them."""
        with self.weights.candidates():
            if self._judged(ids, []).action >= Action.REVERT:
                return Guilt(list(suspects), [], [])
            return self._search(suspects, self._strains(suspects), ids)

    def _search(
        self, suspects: Sequence[StoredFact], strains: Mapping[str, float], ids: Ids
    ) -> Guilt[StoredFact]:
        """What cannot even be solved for is guilty in any company. Of the others, who asks most of
        the weights comes last, and is found to be too many, if any is."""
        broken = [fact for fact in suspects if strains[fact.id] == math.inf]
        others = [fact for fact in suspects if fact not in broken]
        ranked = sorted(others, key=lambda fact: strains[fact.id])
        found = search(ranked, partial(self._judged, ids), self._alone, Action.REVERT)
        guilty = [(fact, self._alone(fact)) for fact in broken]
        return replace(found, guilty=[*guilty, *found.guilty])

    def _strains(self, facts: Sequence[StoredFact]) -> dict[str, float]:
        found = dict[str, float]()
        for fact in facts:
            found[fact.id] = self.weights.strain(fact.id)
            self.weights.breathe(self.pulse)
        return found

    def _judged(self, ids: Ids, some: Sequence[StoredFact]) -> Verdict:
        self.weights.breathe(self.pulse)
        return self.weights.verdict_on(ids(some))

    def _alone(self, fact: StoredFact) -> Verdict:
        self.weights.breathe(self.pulse)
        return self.weights.verdict_on([fact.id])

    def lock_up(
        self,
        guilty: Sequence[tuple[StoredFact, Verdict]],
        crowd: Sequence[StoredFact] = (),
        why: str = SAID,
    ) -> None:
        """End the guilty, each with the measures that condemned it, and let the crowd wait for the
        side memory; all in one change."""
        leaving = [Leaving(fact, State.RECEIVED, why) for fact in crowd]
        for fact, verdict in guilty:
            said = f"{SAID}: alone it makes the weights sick: {'; '.join(verdict.reasons)}"
            leaving.append(Leaving(fact, State.REVERTED, said))
        if leaving:
            also = partial(self._written, guilty, crowd)
            self.weights.part_with(leaving, why, also=also)

    def _written(
        self, guilty: Sequence[tuple[StoredFact, Verdict]], crowd: Sequence[StoredFact]
    ) -> None:
        for fact, verdict in guilty:
            self.store.drop_terms(fact.id)
            self.store.event(SAID, fact.id, reasons=list(verdict.reasons))
        self.weights.wait_beside(crowd)
