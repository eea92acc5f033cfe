"""The flush: move a batch of facts into the weights by MEMIT-MASS, as far as they stay healthy."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from kedit_daemon.editing.capacity_log import FULL_SHARE
from kedit_daemon.editing.fact_lifecycle import Lifecycle
from kedit_daemon.editing.flush_outcome import FlushRecorder, Trial, make_report
from kedit_daemon.editing.generations import Candidate, Generations
from kedit_daemon.editing.live_model import LiveModel
from kedit_daemon.editing.quarantine import Quarantine
from kedit_daemon.editing.tensor_files import unpack_keys
from memory.db.rows import StoredFact
from memory.db.store import Store
from memory.errors import KeditError, Unsolvable
from memory.facts import Fact, FactState
from policies.batch_selection import limit_total_size, select_members
from policies.capacity import Capacity, make_observation
from policies.edit_terms import EditTerms, Refusal, pack_terms
from policies.health_limits import Action
from policies.probe import Probe, answer_probes, compare_answers
from policies.prompts import estimate_key_bytes
from policies.routing import is_for_batch
from policies.targets import compute_terms

MAX_SHRINK = 4  # an oversized batch is divided by at most this at once
MAX_ROUNDS = 3  # solves without the facts that did not hold in the one before


class Flush:
    """Moves facts that wait, or are live in the side memory, into the weights."""

    def __init__(
        self,
        live_model: LiveModel,
        store: Store,
        lifecycle: Lifecycle,
        generations: Generations,
        pulse: Callable[[], None],
        selective: bool = True,
    ) -> None:
        """`selective`: leave out facts that do not hold, and those beyond the known capacity."""
        self.live_model, self.model, self.store = live_model, live_model.model, store
        self.lifecycle, self.generations = lifecycle, generations
        self.pulse, self.is_selective = pulse, selective
        self.capacity_log = generations.capacity_log
        self.quarantine = Quarantine(store, lifecycle, generations, pulse)
        self.recorder = FlushRecorder(store, lifecycle, self.capacity_log)

    # Selection ----------------------------------------------------------------------------------

    def select_batch(self, max_facts: int, max_bytes: int) -> list[StoredFact]:
        """Select the facts of the next flush, the first ones first. `max_bytes`: of their keys."""
        sent = {f.id: f for f in self.store.list_facts((FactState.RECEIVED,)) if is_for_batch(f)}
        live = self.store.list_facts((FactState.LIVE_SIDE,))
        in_side = {f.id: f for f in live if f.fact.picture is None}
        rows = self.store.artifacts.read_side_keys()
        keys = {row.fact_id: unpack_keys(row.blob).subject for row in rows}
        chosen = select_members(list(sent), list(in_side), keys, max_facts)
        facts, site = sent | in_side, self.live_model.site
        sizes = {n: estimate_key_bytes(self.model, site, facts[n].fact) for n in chosen}
        return [facts[n] for n in limit_total_size(chosen, sizes, max_bytes)]

    def compute_headroom(self, capacity: int | None) -> float:
        """Compute how many more facts the weights take. For the last few of the capacity it is not
        worth making a generation."""
        if capacity is None or not self.is_selective:
            return math.inf
        left = capacity - len(self.live_model.list_weights_facts())
        return left if left > (1 - FULL_SHARE) * capacity else 0

    def select_fitting(
        self, batch: Sequence[StoredFact], capacity: Capacity | None
    ) -> list[StoredFact]:
        """Select the facts of a batch that fit into the capacity; a replacement needs none."""
        headroom = self.compute_headroom(capacity.facts if capacity else None)
        fitting = list[StoredFact]()
        for fact in batch:
            is_new = not self.lifecycle.is_replacement(fact)
            if not is_new or headroom >= 1:
                fitting.append(fact)
                headroom -= is_new
        return fitting

    def _ids_with(self, facts: Sequence[StoredFact]) -> list[str]:
        """Return the ids in the weights once these facts are: what they replace is gone."""
        gone = self.lifecycle.find_all_superseded(facts)
        kept = [n for n in self.live_model.list_weights_facts() if n not in gone]
        return [*kept, *(f.id for f in facts)]

    # One flush: compute, screen, shrink, activate ------------------------------------------------

    def flush_batch(
        self, batch: Sequence[StoredFact], reason: str, dry_run: bool
    ) -> dict[str, Any]:
        """Move a batch into the weights, or the part of it that fits; return the report.

        Facts that do not hold, and those beyond the capacity, stay where they were.
        """
        began = time.monotonic()
        capacity = self.capacity_log.estimate_capacity()
        fitting = self.select_fitting(batch, capacity)
        if capacity is not None and batch and not fitting:
            return self._report_unchanged({}, dry_run, [f"weights full: {capacity}"])
        batch, refused = self._compute_targets(fitting, dry_run)
        if not batch:
            return self._report_unchanged(refused, dry_run)
        with self.generations.serve_candidates():
            candidate, culprits = self._screen(batch, dry_run)
            batch = [f for f in batch if f.id not in culprits]
            if candidate is None:
                report = self._report_unchanged(refused, dry_run)
                return report | {"quarantined": sorted(culprits)}
            before = self.live_model.probe_unedited([f.fact for f in batch])
            candidate, trial, oversized = self._shrink(batch, candidate, before)
            if not dry_run:
                self._activate(candidate, trial, oversized, before, reason, began)
            generation = self.store.artifacts.active_generation()
            report = make_report(trial, refused, generation, dry_run)
        return report | {"quarantined": sorted(culprits)}

    def _compute_targets(
        self, batch: Sequence[StoredFact], dry_run: bool
    ) -> tuple[list[StoredFact], dict[str, Refusal]]:
        """Compute the terms of a batch. Return its facts that have some and are the newest of
        their slots, and the refusals by fact id."""
        new = [f.fact for f in batch if f.state is FactState.RECEIVED]
        refused = self.live_model.find_gibberish(new)
        refused |= self.ensure_terms([f.fact for f in batch if f.id not in refused])
        usable = [f for f in batch if f.id not in refused]
        if not dry_run:
            left = [f for f in batch if f.id in refused]
            with self.store.db.transaction():
                self.recorder.reject_refused(left, refused, is_whole_batch=not usable)
        superseded = self.lifecycle.find_all_superseded(usable)
        return [f for f in usable if f.id not in superseded], refused

    def _screen(
        self, batch: Sequence[StoredFact], dry_run: bool
    ) -> tuple[Candidate | None, set[str]]:
        """Make a candidate with a batch. If the weights would have to be reverted, quarantine the
        facts that cause it. Return the candidate without these, if any are left, and their ids."""
        self.generations.pulse_with_active(self.pulse)
        with suppress(Unsolvable):  # which counts as a revert
            candidate = self.generations.make_candidate(self._ids_with(batch))
            if candidate.verdict.action < Action.REVERT:
                return candidate, set()
        culprits = self.quarantine.find_lone_culprits(batch, self._ids_with)
        if culprits and not dry_run:
            self.quarantine.quarantine_facts(culprits)
        ids = {fact.id for fact, _ in culprits}
        left = [f for f in batch if f.id not in ids]
        if not left:
            self.model.set_deltas(self.live_model.active_deltas)
            return None, ids
        return self.generations.make_candidate(self._ids_with(left)), ids

    def _shrink(
        self, batch: Sequence[StoredFact], candidate: Candidate, before: Mapping[str, list[str]]
    ) -> tuple[Candidate, Trial, list[Trial]]:
        """Try smaller parts of a batch until the weights are healthy. Return the last candidate
        and its trial, and the trials of all that were oversized."""
        candidate, trial = self._try_candidate(batch, candidate, before)
        oversized = list[Trial]()
        while not trial.is_healthy:
            self.generations.pulse_with_active(self.pulse)
            oversized.append(trial)
            part = self._select_smaller(oversized)
            if not part:
                break
            candidate = self.generations.make_candidate(self._ids_with(part))
            candidate, smaller = self._try_candidate(part, candidate, before)
            trial = smaller.merge_larger(trial)
        return candidate, trial, oversized

    def _try_candidate(
        self, batch: Sequence[StoredFact], candidate: Candidate, before: Mapping[str, list[str]]
    ) -> tuple[Candidate, Trial]:
        """Probe a candidate that holds a batch, and make another without the facts that did not
        hold. Return the last candidate and its trial."""
        held, probes = list(batch), dict[str, Probe]()
        for _ in range(MAX_ROUNDS):
            after = answer_probes(self.model, [f.fact for f in held])
            probes |= {f.id: compare_answers(f.fact, before[f.id], after[f.id]) for f in held}
            right = [f for f in held if probes[f.id].right]
            if len(right) == len(held) or not self.is_selective:
                break
            held = right
            candidate = self.generations.make_candidate(self._ids_with(held))
        kept = {f.id for f in held}
        lost = [f for f in batch if f.id not in kept]
        count, health, verdict = len(candidate.fact_ids), candidate.health, candidate.verdict
        return candidate, Trial(count, held, lost, probes, health, verdict)

    def _select_smaller(self, oversized: Sequence[Trial]) -> list[StoredFact]:
        """Select the part of the last trial's facts to try next; none if it would be all of them.

        It is what the capacity seems to be, but not below 1 / MAX_SHRINK: a fit to few points may
        be far too low.
        """
        last = oversized[-1].held_facts
        seen = [make_observation(trial.facts, trial.health.as_dict()) for trial in oversized]
        part = self.select_fitting(last, self.capacity_log.estimate_capacity(seen))
        part = max(part, last[: len(last) // MAX_SHRINK], key=len)
        if len(oversized) > 1:
            part = part[: len(last) // 2]  # the estimate was too large once already
        return part if len(part) < len(last) else []

    def _activate(
        self,
        candidate: Candidate,
        trial: Trial,
        oversized: Sequence[Trial],
        before: Mapping[str, list[str]],
        reason: str,
        began: float,
    ) -> None:
        """Activate the candidate of a trial if it is healthy, and record the outcome."""
        if not trial.held_facts or not trial.is_healthy:
            with self.store.db.transaction():
                self.recorder.record_not_taken(trial, oversized)
            return
        seconds = (time.monotonic() - began) / len(trial.held_facts)
        asked = {f.id for f in trial.held_facts if self.live_model.side.is_asked(f.id)}
        gone = {f.id for f in trial.held_facts} - asked

        def move_facts(generation: int) -> None:
            self.recorder.record_flushed(generation, trial, oversized, before, seconds, asked)

        gone |= self.lifecycle.find_all_superseded(trial.held_facts)
        self.generations.activate_candidate(candidate, reason, move_facts, gone)

    def _report_unchanged(
        self, refused: Mapping[str, Refusal], dry_run: bool, reasons: Sequence[str] = ()
    ) -> dict[str, Any]:
        health, verdict = self.generations.measure_health()
        verdict = replace(verdict, reasons=(*reasons, *verdict.reasons))
        trial = Trial(0, [], [], {}, health, verdict)
        return make_report(trial, refused, self.store.artifacts.active_generation(), dry_run)

    def record_failed_flush(self, batch: Sequence[StoredFact], reason: str) -> None:
        """Record a flush that could not be done at all."""
        with self.store.db.transaction():
            self.recorder.hold_flushes(batch, reason)

    # Terms --------------------------------------------------------------------------------------

    def ensure_terms(self, facts: Sequence[Fact], *, again: bool = False) -> dict[str, Refusal]:
        """Compute and store the terms of every fact that has none, or of all if `again`. Return
        the refusals by fact id."""
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
        """Check that the fact has terms that can be read."""
        try:
            return bool(self.store.artifacts.read_terms(fact.id))
        except KeditError:
            return False
