"""The outcome of a flush: what was solved, what became of its facts, and the report of it."""

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from kedit_daemon.editing.capacity_log import CapacityLog
from kedit_daemon.editing.fact_lifecycle import Lifecycle
from memory.db import meta_keys
from memory.db.rows import StoredFact
from memory.db.store import Store
from memory.facts import FactState
from memory.model.canary import Health
from policies.edit_terms import Refusal
from policies.health_limits import Action, Verdict
from policies.probe import Probe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """Outcome of solving the weights with a batch."""

    facts: int  # in the weights then
    held_facts: list[StoredFact]
    lost_facts: list[StoredFact]  # of the batch, those that did not hold
    probes: dict[str, Probe]
    health: Health
    verdict: Verdict

    @property
    def is_healthy(self) -> bool:
        """Check that the weights may be activated."""
        return self.verdict.action < Action.CONSOLIDATE

    def merge_larger(self, larger: "Trial") -> "Trial":
        """Add the facts that did not hold in the larger trial before, which were left out here."""
        probes = larger.probes | self.probes
        return replace(self, lost_facts=[*larger.lost_facts, *self.lost_facts], probes=probes)


def make_report(
    trial: Trial, refused: Mapping[str, Refusal], generation: int, dry_run: bool
) -> dict[str, Any]:
    """Make the report of a flush, JSON-ready. `generation`: the active one after it."""
    return {
        "flushed": [f.id for f in trial.held_facts] if trial.is_healthy else [],
        "failed": sorted({*(f.id for f in trial.lost_facts), *refused}),
        "generation": generation,
        "verdict": str(trial.verdict.action),
        "reasons": list(trial.verdict.reasons),
        "figures": trial.health.as_dict(),
        "dry_run": dry_run,
    }


class FlushRecorder:
    """Writes the outcome of a flush down. Its methods run inside a transaction of the caller."""

    def __init__(self, store: Store, lifecycle: Lifecycle, capacity_log: CapacityLog) -> None:
        self.store, self.lifecycle, self.capacity_log = store, lifecycle, capacity_log

    def reject_refused(
        self, facts: Sequence[StoredFact], refused: Mapping[str, Refusal], is_whole_batch: bool
    ) -> None:
        """Reject facts that have no targets. What is live in the side memory stays there, and what
        the side memory may learn is tried there."""
        stays = [fact.state is FactState.LIVE_SIDE for fact in facts]
        for fact, stay in zip(facts, stays, strict=True):
            refusal = refused[fact.id]
            if refusal.can_use_side or stay:
                self.lifecycle.record_failed_attempt(fact, "weights", refusal.reason)
            else:
                self.lifecycle.reject(fact, "weights", refusal.reason)
        if is_whole_batch and stays and all(stays):
            self.hold_flushes([], "no fact of the batch has targets that the weights may take")

    def record_flushed(
        self,
        generation: int,
        trial: Trial,
        oversized: Sequence[Trial],
        before: Mapping[str, list[str]],
        seconds: float,
        asked: Set[str],
    ) -> None:
        """Record a flush that made a generation, in the transaction that makes it: what is done
        again after a crash then starts from the same knowledge. The facts `asked`, by id, keep
        their shards, which answer for them in chats."""
        self._record_oversized(oversized)
        for fact in trial.held_facts:
            self.lifecycle.end_superseded(fact)
            if fact.id not in asked:
                self.store.artifacts.drop_side_keys(fact.id)
            first, probe = before[fact.id][0], trial.probes[fact.id]
            self.lifecycle.mark_live(fact, "weights", first, probe, seconds, generation)
        self._record_lost(trial)

    def record_not_taken(self, trial: Trial, oversized: Sequence[Trial]) -> None:
        """Record a flush that made no generation."""
        reverted = trial.verdict.action is Action.REVERT
        self._record_oversized([one for one in oversized if not (reverted and one is trial)])
        lost_waiting = any(f.state is FactState.RECEIVED for f in trial.lost_facts)
        if reverted:
            self.hold_flushes(trial.held_facts, "; ".join(trial.verdict.reasons))
        elif not trial.held_facts and not lost_waiting:
            self.hold_flushes([], "no fact of the batch held in the weights")
        if trial.verdict.action is Action.CONSOLIDATE:
            # A replacement needs no capacity, so more of it would not help: try the side memory.
            waiting = [f for f in trial.held_facts if f.state is FactState.RECEIVED]
            replacements = [f for f in waiting if self.lifecycle.is_replacement(f)]
            capacity = self.capacity_log.estimate_capacity()
            self.lifecycle.redirect_over_capacity(replacements, capacity)
        self._record_lost(trial)

    def hold_flushes(self, facts: Sequence[StoredFact], reason: str) -> None:
        """Refuse a batch that would do harm, or no good, and start no other flush automatically:
        facts in the side memory would be tried again at once, and without end."""
        log.warning("Flush not taken: %s", reason)
        self.store.db.set_meta(meta_keys.FLUSH_HELD, reason)
        self.store.db.write_event("flush_refused", facts=[f.id for f in facts], reasons=reason)
        for fact in facts:
            why = f"the flush was refused: {reason}"
            self.lifecycle.record_failed_attempt(fact, "weights", why)

    def _record_lost(self, trial: Trial) -> None:
        for fact in trial.lost_facts:
            why = f"the weights answered {trial.probes[fact.id].answer!r}"
            self.lifecycle.record_failed_attempt(fact, "weights", why)

    def _record_oversized(self, oversized: Sequence[Trial]) -> None:
        """Record solves with more facts than the weights have capacity for."""
        for one in oversized:
            self.capacity_log.record_oversized(one.facts, one.health)
            action, reasons = str(one.verdict.action), list(one.verdict.reasons)
            self.store.db.write_event(
                "flush_too_large", facts=one.facts, verdict=action, reasons=reasons
            )
