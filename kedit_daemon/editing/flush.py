"""The flush: MEMIT-MASS takes a batch of facts into the weights, if they hold and it stays well."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from kedit_daemon.editing.capacity_log import FULL_SHARE, Trial
from kedit_daemon.editing.generations import Generations
from kedit_daemon.editing.quarantine import Quarantine
from kedit_daemon.editing.tensor_files import unpack_keys
from memory.db import meta_keys
from memory.db.rows import StoredFact
from memory.errors import KeditError
from memory.facts import ACTIVE_STATES, Fact, FactState
from policies.batch_selection import limit_total_size, select_members
from policies.capacity import Capacity, make_observation
from policies.edit_terms import EditTerms, Refusal, pack_terms
from policies.probe import Probe, answer_probes, compare_answers
from policies.prompts import estimate_key_bytes
from policies.routing import find_older_in_slot, is_for_batch
from policies.stability import Action
from policies.targets import compute_terms

MAX_SHRINK = 4  # by how much a batch that is too large is made smaller at once, at most
MAX_ROUNDS = 3  # times that a flush may leave out facts that did not hold and solve again
log = logging.getLogger(__name__)


class Flush:
    """Moves facts from where they wait into the weights."""

    def __init__(
        self,
        weights: Generations,
        attempts: int,
        pulse: Callable[[], None],
        selective: bool = True,
    ) -> None:
        """`selective`: whether facts that do not hold, and those beyond what the weights are known
        to bear, are left out."""
        self.generations, self.live_model, self.is_selective = (
            weights,
            weights.live_model,
            selective,
        )
        self.store, self.model = weights.store, weights.model
        self.max_attempts, self.pulse = attempts, pulse
        self.quarantine = Quarantine(weights, pulse)

    def select_batch(self, most: int, memory: int) -> list[StoredFact]:
        """The facts that the next flush takes, the first ones first: at most so many, with keys
        of at most so many bytes."""
        sent = {f.id: f for f in self.store.list_facts((FactState.RECEIVED,)) if is_for_batch(f)}
        beside = {f.id: f for f in self.store.list_facts((FactState.LIVE_SIDE,))}
        keys = {
            row.fact_id: unpack_keys(row.blob).subject
            for row in self.store.artifacts.read_side_keys()
        }
        chosen = select_members(list(sent), list(beside), keys, most)
        facts = sent | beside
        sizes = {
            n: estimate_key_bytes(self.model, self.live_model.site, facts[n].fact) for n in chosen
        }
        return [facts[n] for n in limit_total_size(chosen, sizes, memory)]

    def compute_headroom(self, most: int | None) -> float:
        """How many more facts the weights take, if they bear so many. For the last few it is not
        worth making a generation."""
        if most is None or not self.is_selective:
            return math.inf
        left = most - len(self.live_model.list_weights_facts())
        return left if left > (1 - FULL_SHARE) * most else 0

    def select_fitting(
        self, batch: Sequence[StoredFact], capacity: Capacity | None
    ) -> list[StoredFact]:
        """Those of a batch for which there is room; what replaces takes none."""
        room, taken = (
            self.compute_headroom(capacity.facts if capacity else None),
            list[StoredFact](),
        )
        for fact in batch:
            new = not self.is_replacement(fact)
            if not new or room >= 1:
                taken.append(fact)
                room -= new
        return taken

    def is_replacement(self, fact: StoredFact) -> bool:
        """Whether it takes the place of a fact in the weights."""
        return any(old.state is FactState.LIVE_WEIGHTS for old in self.find_superseded(fact))

    def send_to_side(self, facts: Sequence[StoredFact]) -> None:
        """What waits for a batch, and finds the weights full, goes to the side memory. Inside a
        transaction."""
        capacity = self.generations.capacity_log.estimate_capacity()
        if capacity is None:
            return
        why = {"figure": capacity.figure, "capacity": capacity.facts, "limit": capacity.limit}
        for fact in facts:
            self.store.send_to_side(fact.id, "weights_full", **why)

    def flush_batch(
        self, batch: Sequence[StoredFact], reason: str, dry_run: bool
    ) -> dict[str, Any]:
        """Move a batch into the weights, or the part of it that they bear. Facts that do not
        hold, and those for which there is no room, stay where they were."""
        began = time.monotonic()
        capacity = self.generations.capacity_log.estimate_capacity()
        fitting = self.select_fitting(batch, capacity)
        if capacity is not None and batch and not fitting:
            return self._report_no_change({}, dry_run, [f"weights full: {capacity}"])
        new = [f.fact for f in fitting if f.state is FactState.RECEIVED]
        refused = self.live_model.find_gibberish(new)
        refused |= self.ensure_terms([f.fact for f in fitting if f.id not in refused])
        batch = [f for f in fitting if f.id not in refused]
        if not dry_run:
            self._reject_refused([f for f in fitting if f.id in refused], refused, alone=not batch)
        if not batch:
            return self._report_no_change(refused, dry_run)
        old = {f.id: {o.id for o in self.find_superseded(f)} for f in batch}
        batch = [f for f in batch if not any(f.id in ended for ended in old.values())]
        with self.generations.serve_candidates():
            guilty = self.quarantine.find_lone_culprits(batch, self._ids_with)
            if guilty and not dry_run:
                self.quarantine.quarantine_facts(guilty)
            sick = {f.id for f, _ in guilty}
            batch = [f for f in batch if f.id not in sick]
            if not batch:
                return self._report_no_change(refused, dry_run) | {"quarantined": sorted(sick)}
            before = self.live_model.probe_unedited([f.fact for f in batch])
            self.generations.solve(self._ids_with(batch))
            trial, unborne = self._evaluate_candidate(batch, before), list[Trial]()
            while trial.verdict.action >= Action.CONSOLIDATE:
                self.generations.pulse_with_active(self.pulse)
                unborne.append(trial)
                part = self._shrink_batch(unborne)
                if not part:
                    break
                self.generations.solve(self._ids_with(part))
                trial = self._evaluate_candidate(part, before).merge_larger(trial)
            result = self._make_report(trial, refused, dry_run) | {"quarantined": sorted(sick)}
            if dry_run:
                return result
            if trial.held_facts and trial.verdict.action < Action.CONSOLIDATE:
                seconds = (time.monotonic() - began) / len(trial.held_facts)
                result["generation"] = self.generations.activate_candidate(
                    self._ids_with(trial.held_facts),
                    reason,
                    trial.health,
                    lambda n: self._record_flushed(n, trial, unborne, before, seconds),
                )
            else:
                with self.store.db.transaction():
                    self._record_not_taken(trial, unborne)
        return result

    def _evaluate_candidate(
        self, batch: Sequence[StoredFact], before: dict[str, list[str]]
    ) -> Trial:
        """Look at the candidate, which holds the batch: who holds, and is it well?"""
        probes, lost = self._probe_candidate(batch, before)
        health, verdict = self.generations.measure_health()
        taken = [f for f in batch if f.id not in lost]
        lost_facts = [f for f in batch if f.id in lost]
        count = len(self._ids_with(taken))
        return Trial(count, taken, lost_facts, probes, health, verdict)

    def _shrink_batch(self, unborne: Sequence[Trial]) -> list[StoredFact]:
        """The part of the last trial's facts to try next, if it is smaller than all of them: what
        the weights seem to bear, but a share that a fit to few points cannot be far below."""
        last = unborne[-1].held_facts
        seen = [make_observation(trial.facts, trial.health.as_dict()) for trial in unborne]
        part = self.select_fitting(last, self.generations.capacity_log.estimate_capacity(seen))
        part = max(part, last[: len(last) // MAX_SHRINK], key=len)
        if len(unborne) > 1:
            part = part[: len(last) // 2]  # what was foreseen was too much once already
        return part if len(part) < len(last) else []

    def record_failed_flush(self, batch: Sequence[StoredFact], why: str) -> None:
        """Write down that a flush could not be done at all."""
        with self.store.db.transaction():
            self._hold_flushes(batch, why)

    def _record_not_taken(self, trial: Trial, unborne: Sequence[Trial]) -> None:
        """Draw the consequences of a flush that made no generation. Inside a transaction."""
        reverted = trial.verdict.action is Action.REVERT
        self._record_oversized([one for one in unborne if not (reverted and one is trial)])
        if reverted:
            self._hold_flushes(trial.held_facts, "; ".join(trial.verdict.reasons))
        elif not trial.held_facts and not any(
            f.state is FactState.RECEIVED for f in trial.lost_facts
        ):
            self._hold_flushes([], "no fact of the batch held in the weights")
        if trial.verdict.action is Action.CONSOLIDATE:
            # Room does not help a fact that needs none: only the side memory can take it.
            sent = [
                f
                for f in trial.held_facts
                if f.state is FactState.RECEIVED and self.is_replacement(f)
            ]
            self.send_to_side(sent)
        self._record_lost(trial)

    def _record_lost(self, trial: Trial) -> None:
        answers = {n: f"the weights answered {p.answer!r}" for n, p in trial.probes.items()}
        self._record_attempts(trial.lost_facts, answers)

    def _record_oversized(self, unborne: Sequence[Trial]) -> None:
        """Keep, and write down, what was solved and found to be more than the weights bear."""
        for one in unborne:
            self.generations.capacity_log.record_oversized(one.facts, one.health)
            action, reasons = str(one.verdict.action), list(one.verdict.reasons)
            self.store.db.write_event(
                "flush_too_large", facts=one.facts, verdict=action, reasons=reasons
            )

    def _make_report(
        self, trial: Trial, refused: dict[str, Refusal], dry_run: bool
    ) -> dict[str, Any]:
        well = trial.verdict.action < Action.CONSOLIDATE
        return {
            "flushed": [f.id for f in trial.held_facts] if well else [],
            "failed": sorted({*(f.id for f in trial.lost_facts), *refused}),
            "generation": self.store.artifacts.active_generation(),
            "verdict": str(trial.verdict.action),
            "reasons": list(trial.verdict.reasons),
            "figures": trial.health.as_dict(),
            "dry_run": dry_run,
        }

    def _report_no_change(
        self, refused: dict[str, Refusal], dry_run: bool, why: Sequence[str] = ()
    ) -> dict[str, Any]:
        health, verdict = self.generations.measure_health()
        verdict = replace(verdict, reasons=(*why, *verdict.reasons))
        return self._make_report(Trial(0, [], [], {}, health, verdict), refused, dry_run)

    def ensure_terms(self, facts: Sequence[Fact], *, again: bool = False) -> dict[str, Refusal]:
        """Terms for every fact that has none yet, or for each `again`, kept as they come; why some
        were refused."""
        refused: dict[str, Refusal] = {}

        def keep(part: dict[str, EditTerms | Refusal]) -> None:
            with self.store.db.transaction():
                for fact_id, terms in part.items():
                    if isinstance(terms, Refusal):
                        refused[fact_id] = terms
                    else:
                        self.store.artifacts.put_terms(fact_id, pack_terms(terms))
            self.pulse()

        norms = {n: s.median_norm for n, s in self.live_model.loaded_model.statistics.items()}
        wanted = [fact for fact in facts if again or not self._has_terms(fact)]
        compute_terms(self.model, self.live_model.site, norms, wanted, keep)
        return refused

    def _has_terms(self, fact: Fact) -> bool:
        """Whether it has some that can be read."""
        try:
            return bool(self.store.artifacts.read_terms(fact.id))
        except KeditError:
            return False

    def _ids_with(self, facts: Sequence[StoredFact]) -> list[str]:
        """The facts in the weights once these are, by id: what they replace is gone."""
        gone = {old.id for fact in facts for old in self.find_superseded(fact)}
        kept = [n for n in self.live_model.list_weights_facts() if n not in gone]
        return [*kept, *(f.id for f in facts)]

    def _probe_candidate(
        self, batch: Sequence[StoredFact], before: dict[str, list[str]]
    ) -> tuple[dict[str, Probe], set[str]]:
        """Probe the candidate, and solve again without the facts that it does not hold."""
        lost: set[str] = set()
        probes: dict[str, Probe] = {}
        for _ in range(MAX_ROUNDS):
            held = [f for f in batch if f.id not in lost]
            after = answer_probes(self.model, [f.fact for f in held])
            probes |= {f.id: compare_answers(f.fact, before[f.id], after[f.id]) for f in held}
            wrong = {f.id for f in held if not probes[f.id].right}
            if not wrong or not self.is_selective:
                break
            lost |= wrong
            self.generations.solve(self._ids_with([f for f in held if f.id not in wrong]))
        return probes, lost

    def _record_flushed(
        self,
        number: int,
        trial: Trial,
        unborne: Sequence[Trial],
        before: dict[str, list[str]],
        seconds: float,
    ) -> None:
        """All of it in the transaction that makes the generation: what is done over after a crash
        is then done by the same knowledge."""
        self._record_oversized(unborne)
        for fact in trial.held_facts:
            self.end_superseded(fact)
            probe = trial.probes[fact.id]
            self.store.artifacts.drop_side_keys(fact.id)
            self.store.change_state(
                fact.id,
                FactState.LIVE_WEIGHTS,
                tier="weights",
                generation=number,
                before=before[fact.id][0],
                after=probe.answer,
                probe=probe.as_dict(),
            )
            self.store.add_edit(fact.id, "weights", number, seconds, "live", probe.as_dict())
        self._record_lost(trial)

    def _hold_flushes(self, taken: Sequence[StoredFact], why: str) -> None:
        """A batch that would do harm, or no good, is not taken, and no other is tried by itself:
        facts beside the weights would be tried again at once, and without end. In a transaction."""
        log.warning("flush not taken: %s", why)
        self.store.db.set_meta(meta_keys.FLUSH_HELD, why)
        self.store.db.write_event("flush_refused", facts=[f.id for f in taken], reasons=why)
        self._record_attempts(taken, {f.id: f"the flush was refused: {why}" for f in taken})

    def _reject_refused(
        self, facts: Sequence[StoredFact], refused: dict[str, Refusal], alone: bool
    ) -> None:
        """What has no targets; `alone`: there was nothing else in the batch. What is live beside
        the weights stays there, whatever the reason."""
        stay = [fact.state is FactState.LIVE_SIDE for fact in facts]
        with self.store.db.transaction():
            for fact, stays in zip(facts, stay, strict=True):
                why = refused[fact.id]
                if why.can_use_side or stays:
                    self.record_failed_attempt(fact, "weights", why.reason)
                    continue
                self.store.change_state(fact.id, FactState.REJECTED, reason=why.reason)
                self.store.add_edit(fact.id, "weights", None, 0.0, "rejected", None)
            if alone and stay and all(stay):
                self._hold_flushes([], "no fact of the batch has targets that the weights may take")

    def _record_attempts(self, facts: Sequence[StoredFact], reasons: dict[str, str]) -> None:
        for fact in facts:
            self.record_failed_attempt(fact, "weights", reasons[fact.id])

    def record_failed_attempt(self, fact: StoredFact, tier: str, reason: str) -> None:
        """Let a waiting fact try the other tier, or fail after too many attempts.

        A fact that is live in the side memory simply stays there. Inside a transaction.
        """
        self.store.add_edit(fact.id, tier, None, 0.0, "failed", None)
        self.store.db.write_event("edit_failed", fact.id, tier=tier, reason=reason)
        now = self.store.find_fact(fact.id)  # it may have been moved since it was read
        if (
            now
            and now.state is FactState.RECEIVED
            and self.store.count_attempt(fact.id) >= self.max_attempts
        ):
            self.store.change_state(fact.id, FactState.FAILED, reason=reason)

    def find_superseded(self, fact: StoredFact) -> list[StoredFact]:
        """The active facts that this one takes the place of."""
        return find_older_in_slot(fact, self.store.list_facts(ACTIVE_STATES, slot=fact.fact.slot))

    def end_superseded(self, fact: StoredFact) -> None:
        """End what the fact takes the place of. Inside a transaction."""
        for old in self.find_superseded(fact):
            self.store.artifacts.drop_side_keys(old.id)
            self.store.change_state(old.id, FactState.SUPERSEDED, reason=f"superseded by {fact.id}")
