"""Quarantine: find the facts that make the weights unhealthy, and take them out of both tiers.

The other facts stay where they are. A fact in quarantine has ended; it comes back when it is
submitted again, and its targets are then computed again.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from kedit_daemon.editing.fact_lifecycle import QUARANTINED, FactRemoval, Lifecycle
from kedit_daemon.editing.generations import Generations
from memory.db.rows import StoredFact
from memory.db.store import Store
from memory.facts import FactState
from policies.culprits import Culprits, find_culprits
from policies.health_limits import Action, Verdict

SelectIds = Callable[[Sequence[StoredFact]], Sequence[str]]
"""Return the ids of all facts in the weights once some suspects are."""


class Quarantine:
    """Searches for culprits by solving for parts of a batch."""

    def __init__(
        self,
        store: Store,
        lifecycle: Lifecycle,
        generations: Generations,
        pulse: Callable[[], None],
    ) -> None:
        self.store, self.lifecycle, self.generations = store, lifecycle, generations
        self.pulse = pulse

    def find_lone_culprits(
        self, batch: Sequence[StoredFact], select_ids: SelectIds
    ) -> list[tuple[StoredFact, Verdict]]:
        """Find the facts that make the weights unhealthy each on its own, in a batch that makes
        them so.

        If even the fact with the largest strain is healthy alone, the batch is taken to be too
        large, and no single fact to be the cause.
        """
        strains = self._measure_strains(batch)
        worst = max(batch, key=lambda fact: strains[fact.id])
        if self._judge_ids([worst.id]).action < Action.REVERT:
            return []
        return self._search_ranked(batch, strains, select_ids).culprits

    def find_culprits(
        self, suspects: Sequence[StoredFact], select_ids: SelectIds
    ) -> Culprits[StoredFact]:
        """Find the culprits among suspects with all of which the weights are unhealthy."""
        with self.generations.serve_candidates():
            if self._judge_ids(select_ids([])).action >= Action.REVERT:
                return Culprits(list(suspects), [], [])
            return self._search_ranked(suspects, self._measure_strains(suspects), select_ids)

    def _search_ranked(
        self, suspects: Sequence[StoredFact], strains: Mapping[str, float], select_ids: SelectIds
    ) -> Culprits[StoredFact]:
        """Search in the order of strain, so that the surplus, if any, has the largest. A fact that
        cannot be solved for alone is a culprit in any company."""
        broken = [fact for fact in suspects if strains[fact.id] == math.inf]
        others = [fact for fact in suspects if fact not in broken]
        ranked = sorted(others, key=lambda fact: strains[fact.id])
        found = find_culprits(
            ranked,
            lambda part: self._judge_ids(select_ids(part)),
            lambda fact: self._judge_ids([fact.id]),
            Action.REVERT,
        )
        culprits = [(fact, self._judge_ids([fact.id])) for fact in broken]
        return replace(found, culprits=[*culprits, *found.culprits])

    def _measure_strains(self, facts: Sequence[StoredFact]) -> dict[str, float]:
        strains = dict[str, float]()
        for fact in facts:
            strains[fact.id] = self.generations.measure_strain(fact.id)
            self.generations.pulse_with_active(self.pulse)
        return strains

    def _judge_ids(self, ids: Sequence[str]) -> Verdict:
        self.generations.pulse_with_active(self.pulse)
        return self.generations.judge_facts(ids)

    def quarantine_facts(
        self,
        culprits: Sequence[tuple[StoredFact, Verdict]],
        surplus: Sequence[StoredFact] = (),
        reason: str = QUARANTINED,
    ) -> None:
        """End the culprits, each with the figures that condemned it, and route the surplus to the
        side memory, all in one change."""
        removals = [FactRemoval(fact, FactState.RECEIVED, reason) for fact in surplus]
        for fact, verdict in culprits:
            figures = "; ".join(verdict.reasons)
            why = f"{QUARANTINED}: alone it makes the weights unhealthy: {figures}"
            removals.append(FactRemoval(fact, FactState.REVERTED, why))
        if removals:
            also = partial(self._record_culprits, culprits, surplus)
            self.generations.apply_removals(removals, reason, also=also)

    def _record_culprits(
        self, culprits: Sequence[tuple[StoredFact, Verdict]], surplus: Sequence[StoredFact]
    ) -> None:
        for fact, verdict in culprits:
            self.store.artifacts.drop_terms(fact.id)
            self.store.db.write_event(QUARANTINED, fact.id, reasons=list(verdict.reasons))
        self.lifecycle.redirect_to_side(surplus)
