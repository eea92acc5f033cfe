"""Quarantine: the facts that make the weights sick are found, named, and taken out of both tiers.

What is innocent stays where it is. A fact in quarantine has ended; it comes back when a person
hands it in again, and its targets are then computed anew.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from kedit_daemon.editing.generations import FactRemoval, Generations
from memory.db.rows import StoredFact
from memory.facts import FactState
from policies.culprits import Culprits, find_culprits
from policies.stability import Action, Verdict

QUARANTINED = "quarantined"

SelectIds = Callable[[Sequence[StoredFact]], Sequence[str]]


class Quarantine:
    """Tries parts of a batch on the weights, and locks up who makes them sick alone."""

    def __init__(self, weights: Generations, pulse: Callable[[], None]) -> None:
        self.generations, self.store, self.pulse = weights, weights.store, pulse

    def find_lone_culprits(
        self, batch: Sequence[StoredFact], ids: SelectIds
    ) -> list[tuple[StoredFact, Verdict]]:
        """Who of a batch would make the weights sick all by itself, and how. `ids`: all that is in
        the weights with some of the batch.

        Where even the fact that asks most of them is well alone, there are taken to be too many,
        and no single one to be to blame.
        """
        if self._judge_with(ids, batch).action < Action.REVERT:
            return []
        strains = self._measure_strains(batch)
        worst = max(batch, key=lambda fact: strains[fact.id])
        sick = self._judge_alone(worst).action >= Action.REVERT
        return self._search_ranked(batch, strains, ids).culprits if sick else []

    def find_culprits(self, suspects: Sequence[StoredFact], ids: SelectIds) -> Culprits[StoredFact]:
        """Who of the suspects is to blame, of weights that are sick with all of them."""
        with self.generations.serve_candidates():
            if self._judge_with(ids, []).action >= Action.REVERT:
                return Culprits(list(suspects), [], [])
            return self._search_ranked(suspects, self._measure_strains(suspects), ids)

    def _search_ranked(
        self, suspects: Sequence[StoredFact], strains: Mapping[str, float], ids: SelectIds
    ) -> Culprits[StoredFact]:
        """What cannot even be solved for is guilty in any company. Of the others, who asks most of
        the weights comes last, and is found to be too many, if any is."""
        broken = [fact for fact in suspects if strains[fact.id] == math.inf]
        others = [fact for fact in suspects if fact not in broken]
        ranked = sorted(others, key=lambda fact: strains[fact.id])
        found = find_culprits(
            ranked, partial(self._judge_with, ids), self._judge_alone, Action.REVERT
        )
        guilty = [(fact, self._judge_alone(fact)) for fact in broken]
        return replace(found, culprits=[*guilty, *found.culprits])

    def _measure_strains(self, facts: Sequence[StoredFact]) -> dict[str, float]:
        found = dict[str, float]()
        for fact in facts:
            found[fact.id] = self.generations.measure_strain(fact.id)
            self.generations.pulse_with_active(self.pulse)
        return found

    def _judge_with(self, ids: SelectIds, some: Sequence[StoredFact]) -> Verdict:
        self.generations.pulse_with_active(self.pulse)
        return self.generations.judge_facts(ids(some))

    def _judge_alone(self, fact: StoredFact) -> Verdict:
        self.generations.pulse_with_active(self.pulse)
        return self.generations.judge_facts([fact.id])

    def quarantine_facts(
        self,
        guilty: Sequence[tuple[StoredFact, Verdict]],
        crowd: Sequence[StoredFact] = (),
        why: str = QUARANTINED,
    ) -> None:
        """End the guilty, each with the measures that condemned it, and let the crowd wait for the
        side memory; all in one change."""
        leaving = [FactRemoval(fact, FactState.RECEIVED, why) for fact in crowd]
        for fact, verdict in guilty:
            said = f"{QUARANTINED}: alone it makes the weights sick: {'; '.join(verdict.reasons)}"
            leaving.append(FactRemoval(fact, FactState.REVERTED, said))
        if leaving:
            also = partial(self._record_culprits, guilty, crowd)
            self.generations.apply_removals(leaving, why, also=also)

    def _record_culprits(
        self, guilty: Sequence[tuple[StoredFact, Verdict]], crowd: Sequence[StoredFact]
    ) -> None:
        for fact, verdict in guilty:
            self.store.artifacts.drop_terms(fact.id)
            self.store.db.write_event(QUARANTINED, fact.id, reasons=list(verdict.reasons))
        self.generations.redirect_to_side(crowd)
