"""The flush: MEMIT-MASS takes a batch of facts into the weights, if they hold and it stays well."""

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from kedit_daemon.editing.capacity_log import FULL, Trial
from kedit_daemon.editing.generations import HELD, Weights
from kedit_daemon.editing.quarantine import Quarantine
from kedit_daemon.editing.tensor_files import unpack_keys
from memory.db.rows import StoredFact
from memory.errors import KeditError
from memory.facts import ACTIVE, Fact, State
from policies.batch_selection import members, within
from policies.capacity import Capacity, observed
from policies.memit_mass import pack
from policies.probe import Probe, ask_all, compare
from policies.prompts import key_bytes
from policies.routing import older_in_slot, wants_batch
from policies.stability import Action
from policies.targets import Refused, Terms, compute_terms

SHRINKING = 4  # by how much a batch that is too large is made smaller at once, at most
ROUNDS = 3  # times that a flush may leave out facts that did not hold and solve again
log = logging.getLogger(__name__)


class Flush:
    """Moves facts from where they wait into the weights."""

    def __init__(
        self,
        weights: Weights,
        attempts: int,
        pulse: Callable[[], None],
        selective: bool = True,
    ) -> None:
        """`selective`: whether facts that do not hold, and those beyond what the weights are known
        to bear, are left out."""
        self.weights, self.served, self.selective = weights, weights.served, selective
        self.store, self.model = weights.store, weights.model
        self.attempts, self.pulse = attempts, pulse
        self.quarantine = Quarantine(weights, pulse)

    def batch(self, most: int, memory: int) -> list[StoredFact]:
        """The facts that the next flush takes, the first ones first: at most so many, with keys
        of at most so many bytes."""
        sent = {f.id: f for f in self.store.facts((State.RECEIVED,)) if wants_batch(f)}
        beside = {f.id: f for f in self.store.facts((State.LIVE_SIDE,))}
        keys = {row.fact_id: unpack_keys(row.blob).subject for row in self.store.side_rows()}
        chosen = members(list(sent), list(beside), keys, most)
        facts = sent | beside
        sizes = {n: key_bytes(self.model, self.served.site, facts[n].fact) for n in chosen}
        return [facts[n] for n in within(chosen, sizes, memory)]

    def room(self, most: int | None) -> float:
        """How many more facts the weights take, if they bear so many. For the last few it is not
        worth making a generation."""
        if most is None or not self.selective:
            return math.inf
        left = most - len(self.served.weights_facts())
        return left if left > (1 - FULL) * most else 0

    def fitting(self, batch: Sequence[StoredFact], capacity: Capacity | None) -> list[StoredFact]:
        """Those of a batch for which there is room; what replaces takes none."""
        room, taken = self.room(capacity.facts if capacity else None), list[StoredFact]()
        for fact in batch:
            new = not self.replaces(fact)
            if not new or room >= 1:
                taken.append(fact)
                room -= new
        return taken

    def replaces(self, fact: StoredFact) -> bool:
        """Whether it takes the place of a fact in the weights."""
        return any(old.state is State.LIVE_WEIGHTS for old in self.older(fact))

    def send_beside(self, facts: Sequence[StoredFact]) -> None:
        """What waits for a batch, and finds the weights full, goes to the side memory. Inside a
        transaction."""
        capacity = self.weights.room.capacity()
        if capacity is None:
            return
        why = {"figure": capacity.figure, "capacity": capacity.facts, "limit": capacity.limit}
        for fact in facts:
            self.store.send_beside(fact.id, "weights_full", **why)

    def run(self, batch: Sequence[StoredFact], reason: str, dry_run: bool) -> dict[str, Any]:
        """Move a batch into the weights, or the part of it that they bear. Facts that do not
        hold, and those for which there is no room, stay where they were."""
        began = time.monotonic()
        capacity = self.weights.room.capacity()
        fitting = self.fitting(batch, capacity)
        if capacity is not None and batch and not fitting:
            return self._nothing({}, dry_run, [f"weights full: {capacity}"])
        new = [f.fact for f in fitting if f.state is State.RECEIVED]
        refused = self.served.nonsense(new)
        refused |= self.compute([f.fact for f in fitting if f.id not in refused])
        batch = [f for f in fitting if f.id not in refused]
        if not dry_run:
            self._reject([f for f in fitting if f.id in refused], refused, alone=not batch)
        if not batch:
            return self._nothing(refused, dry_run)
        old = {f.id: {o.id for o in self.older(f)} for f in batch}
        batch = [f for f in batch if not any(f.id in ended for ended in old.values())]
        with self.weights.candidates():
            guilty = self.quarantine.sift(batch, self._with)
            if guilty and not dry_run:
                self.quarantine.lock_up(guilty)
            sick = {f.id for f, _ in guilty}
            batch = [f for f in batch if f.id not in sick]
            if not batch:
                return self._nothing(refused, dry_run) | {"quarantined": sorted(sick)}
            before = self.served.probe_before([f.fact for f in batch])
            self.weights.solve(self._with(batch))
            trial, unborne = self._tried(batch, before), list[Trial]()
            while trial.verdict.action >= Action.CONSOLIDATE:
                self.weights.breathe(self.pulse)
                unborne.append(trial)
                part = self._smaller(unborne)
                if not part:
                    break
                self.weights.solve(self._with(part))
                trial = self._tried(part, before).after(trial)
            result = self._result(trial, refused, dry_run) | {"quarantined": sorted(sick)}
            if dry_run:
                return result
            if trial.taken and trial.verdict.action < Action.CONSOLIDATE:
                seconds = (time.monotonic() - began) / len(trial.taken)
                result["generation"] = self.weights.publish(
                    self._with(trial.taken),
                    reason,
                    trial.health,
                    lambda n: self._flushed(n, trial, unborne, before, seconds),
                )
            else:
                with self.store.transaction():
                    self._not_taken(trial, unborne)
        return result

    def _tried(self, batch: Sequence[StoredFact], before: dict[str, list[str]]) -> Trial:
        """Look at the candidate, which holds the batch: who holds, and is it well?"""
        probes, lost = self._hold(batch, before)
        health, verdict = self.weights.measured()
        taken = [f for f in batch if f.id not in lost]
        lost_facts = [f for f in batch if f.id in lost]
        count = len(self._with(taken))
        return Trial(count, taken, lost_facts, probes, health, verdict)

    def _smaller(self, unborne: Sequence[Trial]) -> list[StoredFact]:
        """The part of the last trial's facts to try next, if it is smaller than all of them: what
        the weights seem to bear, but a share that a fit to few points cannot be far below."""
        last = unborne[-1].taken
        seen = [observed(trial.facts, trial.health.as_dict()) for trial in unborne]
        part = self.fitting(last, self.weights.room.capacity(seen))
        part = max(part, last[: len(last) // SHRINKING], key=len)
        if len(unborne) > 1:
            part = part[: len(last) // 2]  # what was foreseen was too much once already
        return part if len(part) < len(last) else []

    def give_up(self, batch: Sequence[StoredFact], why: str) -> None:
        """Write down that a flush could not be done at all."""
        with self.store.transaction():
            self._hold_back(batch, why)

    def _not_taken(self, trial: Trial, unborne: Sequence[Trial]) -> None:
        """Draw the consequences of a flush that made no generation. Inside a transaction."""
        reverted = trial.verdict.action is Action.REVERT
        self._learn([one for one in unborne if not (reverted and one is trial)])
        if reverted:
            self._hold_back(trial.taken, "; ".join(trial.verdict.reasons))
        elif not trial.taken and not any(f.state is State.RECEIVED for f in trial.lost):
            self._hold_back([], "no fact of the batch held in the weights")
        if trial.verdict.action is Action.CONSOLIDATE:
            # Room does not help a fact that needs none: only the side memory can take it.
            sent = [f for f in trial.taken if f.state is State.RECEIVED and self.replaces(f)]
            self.send_beside(sent)
        self._retry_lost(trial)

    def _retry_lost(self, trial: Trial) -> None:
        answers = {n: f"the weights answered {p.answer!r}" for n, p in trial.probes.items()}
        self._retry(trial.lost, answers)

    def _learn(self, unborne: Sequence[Trial]) -> None:
        """Keep, and write down, what was solved and found to be more than the weights bear."""
        for one in unborne:
            self.weights.room.too_many(one.facts, one.health)
            action, reasons = str(one.verdict.action), list(one.verdict.reasons)
            self.store.event("flush_too_large", facts=one.facts, verdict=action, reasons=reasons)

    def _result(self, trial: Trial, refused: dict[str, Refused], dry_run: bool) -> dict[str, Any]:
        well = trial.verdict.action < Action.CONSOLIDATE
        return {
            "flushed": [f.id for f in trial.taken] if well else [],
            "failed": sorted({*(f.id for f in trial.lost), *refused}),
            "generation": self.store.active_generation(),
            "verdict": str(trial.verdict.action),
            "reasons": list(trial.verdict.reasons),
            "figures": trial.health.as_dict(),
            "dry_run": dry_run,
        }

    def _nothing(
        self, refused: dict[str, Refused], dry_run: bool, why: Sequence[str] = ()
    ) -> dict[str, Any]:
        health, verdict = self.weights.measured()
        verdict = replace(verdict, reasons=(*why, *verdict.reasons))
        return self._result(Trial(0, [], [], {}, health, verdict), refused, dry_run)

    def compute(self, facts: Sequence[Fact], *, again: bool = False) -> dict[str, Refused]:
        """Terms for every fact that has none yet, or for each `again`, kept as they come; why some
        were refused."""
        refused: dict[str, Refused] = {}

        def keep(part: dict[str, Terms | Refused]) -> None:
            with self.store.transaction():
                for fact_id, terms in part.items():
                    if isinstance(terms, Refused):
                        refused[fact_id] = terms
                    else:
                        self.store.put_terms(fact_id, pack(terms))
            self.pulse()

        norms = {n: s.norm for n, s in self.served.loaded.statistics.items()}
        wanted = [fact for fact in facts if again or not self._has_terms(fact)]
        compute_terms(self.model, self.served.site, norms, wanted, keep)
        return refused

    def _has_terms(self, fact: Fact) -> bool:
        """Whether it has some that can be read."""
        try:
            return bool(self.store.terms(fact.id))
        except KeditError:
            return False

    def _with(self, facts: Sequence[StoredFact]) -> list[str]:
        """The facts in the weights once these are, by id: what they replace is gone."""
        gone = {old.id for fact in facts for old in self.older(fact)}
        kept = [n for n in self.served.weights_facts() if n not in gone]
        return [*kept, *(f.id for f in facts)]

    def _hold(
        self, batch: Sequence[StoredFact], before: dict[str, list[str]]
    ) -> tuple[dict[str, Probe], set[str]]:
        """Probe the candidate, and solve again without the facts that it does not hold."""
        lost: set[str] = set()
        probes: dict[str, Probe] = {}
        for _ in range(ROUNDS):
            held = [f for f in batch if f.id not in lost]
            after = ask_all(self.model, [f.fact for f in held])
            probes |= {f.id: compare(f.fact, before[f.id], after[f.id]) for f in held}
            wrong = {f.id for f in held if not probes[f.id].right}
            if not wrong or not self.selective:
                break
            lost |= wrong
            self.weights.solve(self._with([f for f in held if f.id not in wrong]))
        return probes, lost

    def _flushed(
        self,
        number: int,
        trial: Trial,
        unborne: Sequence[Trial],
        before: dict[str, list[str]],
        seconds: float,
    ) -> None:
        """All of it in the transaction that makes the generation: what is done over after a crash
        is then done by the same knowledge."""
        self._learn(unborne)
        for fact in trial.taken:
            self.supersede(fact)
            probe = trial.probes[fact.id]
            self.store.drop_side(fact.id)
            self.store.move(
                fact.id,
                State.LIVE_WEIGHTS,
                tier="weights",
                generation=number,
                before=before[fact.id][0],
                after=probe.answer,
                probe=probe.as_dict(),
            )
            self.store.add_edit(fact.id, "weights", number, seconds, "live", probe.as_dict())
        self._retry_lost(trial)

    def _hold_back(self, taken: Sequence[StoredFact], why: str) -> None:
        """A batch that would do harm, or no good, is not taken, and no other is tried by itself:
        facts beside the weights would be tried again at once, and without end. In a transaction."""
        log.warning("flush not taken: %s", why)
        self.store.set_meta(HELD, why)
        self.store.event("flush_refused", facts=[f.id for f in taken], reasons=why)
        self._retry(taken, {f.id: f"the flush was refused: {why}" for f in taken})

    def _reject(
        self, facts: Sequence[StoredFact], refused: dict[str, Refused], alone: bool
    ) -> None:
        """What has no targets; `alone`: there was nothing else in the batch. What is live beside
        the weights stays there, whatever the reason."""
        stay = [fact.state is State.LIVE_SIDE for fact in facts]
        with self.store.transaction():
            for fact, stays in zip(facts, stay, strict=True):
                why = refused[fact.id]
                if why.beside or stays:
                    self.retry(fact, "weights", why.reason)
                    continue
                self.store.move(fact.id, State.REJECTED, reason=why.reason)
                self.store.add_edit(fact.id, "weights", None, 0.0, "rejected", None)
            if alone and stay and all(stay):
                self._hold_back([], "no fact of the batch has targets that the weights may take")

    def _retry(self, facts: Sequence[StoredFact], reasons: dict[str, str]) -> None:
        for fact in facts:
            self.retry(fact, "weights", reasons[fact.id])

    def retry(self, fact: StoredFact, tier: str, reason: str) -> None:
        """Let a waiting fact try the other tier, or fail after too many attempts.

        A fact that is live in the side memory simply stays there. Inside a transaction.
        """
        self.store.add_edit(fact.id, tier, None, 0.0, "failed", None)
        self.store.event("edit_failed", fact.id, tier=tier, reason=reason)
        now = self.store.fact(fact.id)  # it may have been moved since it was read
        if now and now.state is State.RECEIVED and self.store.attempted(fact.id) >= self.attempts:
            self.store.move(fact.id, State.FAILED, reason=reason)

    def older(self, fact: StoredFact) -> list[StoredFact]:
        """The active facts that this one takes the place of."""
        return older_in_slot(fact, self.store.facts(ACTIVE, slot=fact.fact.slot))

    def supersede(self, fact: StoredFact) -> None:
        """End what the fact takes the place of. Inside a transaction."""
        for old in self.older(fact):
            self.store.drop_side(old.id)
            self.store.move(old.id, State.SUPERSEDED, reason=f"superseded by {fact.id}")
