"""The flush: MEMIT-MASS takes a batch of facts into the weights, if they hold and it stays well."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from kedit_daemon.weights import HELD, Weights
from memory.facts import ACTIVE, Fact, State
from memory.rows import StoredFact
from policies.probe import Probe, ask_all, compare
from policies.routing import older_in_slot, wants_batch
from policies.stability import Action
from policies.targets import Refused, Terms, compute_terms
from policies.weights import pack

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
        """`selective`: whether a fact that the candidate does not answer with is left out."""
        self.weights, self.served, self.selective = weights, weights.served, selective
        self.store, self.model = weights.store, weights.model
        self.attempts, self.pulse = attempts, pulse

    def batch(self, most: int) -> list[StoredFact]:
        """The facts that the next flush takes: those sent straight to a batch, then the oldest."""
        waiting = [f for f in self.store.facts((State.RECEIVED,)) if wants_batch(f)]
        return [*waiting, *self.store.facts((State.LIVE_SIDE,))][:most]

    def run(self, batch: Sequence[StoredFact], reason: str, dry_run: bool) -> dict[str, Any]:
        """Move a batch into the weights. Facts that do not hold stay where they were."""
        began = time.monotonic()
        refused = self._compute([f.fact for f in batch])
        self._reject([f for f in batch if f.id in refused], refused)
        batch = [f for f in batch if f.id not in refused]
        if not batch:
            return self._nothing(refused, dry_run)
        old = {f.id: {o.id for o in self.older(f)} for f in batch}
        batch = [f for f in batch if not any(f.id in ended for ended in old.values())]
        old = {f.id: old[f.id] for f in batch}
        kept = self._kept(old, set())
        before = self.served.probe_before([f.fact for f in batch])
        with self.weights.trial([*kept, *(f.id for f in batch)]):
            probes, lost = self._hold(old, [f.fact for f in batch], before)
            health, verdict = self.weights.measured()
            taken = [f for f in batch if f.id not in lost]
            failed = [f for f in batch if f.id in lost]
            result: dict[str, Any] = {
                "flushed": [f.id for f in taken],
                "failed": sorted({*lost, *refused}),
                "generation": self.store.active_generation(),
                "verdict": str(verdict.action),
                "reasons": list(verdict.reasons),
                "figures": health.as_dict(),
                "dry_run": dry_run,
            }
            if dry_run:
                return result
            if taken and verdict.action is not Action.REVERT:
                seconds = (time.monotonic() - began) / len(batch)
                ids = [*self._kept(old, lost), *result["flushed"]]
                result["generation"] = self.weights.publish(
                    ids, reason, health, lambda n: self._flushed(n, taken, before, probes, seconds)
                )
        if verdict.action is Action.REVERT:
            result["flushed"] = []
            self._hold_back(taken, "; ".join(verdict.reasons))
        elif not taken:
            self._hold_back([], "no fact of the batch held in the weights")
        self._retry(failed, {n: f"the weights answered {p.answer!r}" for n, p in probes.items()})
        self.served.forget_side()
        return result

    def _nothing(self, refused: dict[str, str], dry_run: bool) -> dict[str, Any]:
        health, verdict = self.weights.measured()
        return {
            "flushed": [],
            "failed": sorted(refused),
            "generation": self.store.active_generation(),
            "verdict": str(verdict.action),
            "reasons": list(verdict.reasons),
            "figures": health.as_dict(),
            "dry_run": dry_run,
        }

    def _compute(self, facts: Sequence[Fact]) -> dict[str, str]:
        """Terms for every fact that has none yet, kept as they come; why some were refused."""
        refused: dict[str, str] = {}

        def keep(part: dict[str, Terms | Refused]) -> None:
            with self.store.transaction():
                for fact_id, terms in part.items():
                    if isinstance(terms, Refused):
                        refused[fact_id] = terms.reason
                    else:
                        self.store.put_terms(fact_id, pack(terms))
            self.pulse()

        norms = {n: s.norm for n, s in self.served.loaded.statistics.items()}
        wanted = [fact for fact in facts if not self.store.has_terms(fact.id)]
        compute_terms(self.model, self.served.site, norms, wanted, keep)
        return refused

    def _kept(self, old: dict[str, set[str]], lost: set[str]) -> list[str]:
        """What stays in the weights: all but those that a fact of the batch takes the place of."""
        gone = {n for new, ended in old.items() if new not in lost for n in ended}
        return [n for n in self.served.weights_facts() if n not in gone]

    def _hold(
        self, old: dict[str, set[str]], facts: Sequence[Fact], before: dict[str, list[str]]
    ) -> tuple[dict[str, Probe], set[str]]:
        """Probe the candidate, and solve again without the facts that it does not hold."""
        lost: set[str] = set()
        probes: dict[str, Probe] = {}
        for _ in range(ROUNDS):
            held = [f for f in facts if f.id not in lost]
            after = ask_all(self.model, held)
            probes |= {f.id: compare(f, before[f.id], after[f.id]) for f in held}
            wrong = {f.id for f in held if not probes[f.id].right}
            if not wrong or not self.selective:
                break
            lost |= wrong
            ids = [*self._kept(old, lost), *(f.id for f in facts if f.id not in lost)]
            self.weights.solve(ids)
        return probes, lost

    def _flushed(
        self,
        number: int,
        taken: Sequence[StoredFact],
        before: dict[str, list[str]],
        probes: dict[str, Probe],
        seconds: float,
    ) -> None:
        for fact in taken:
            self.supersede(fact)
            probe = probes[fact.id]
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

    def _hold_back(self, taken: Sequence[StoredFact], why: str) -> None:
        """A batch that would do harm, or no good, is not taken, and no other is tried by itself."""
        log.warning("flush not taken: %s", why)
        with self.store.transaction():
            self.store.set_meta(HELD, why)
            self.store.event("flush_refused", facts=[f.id for f in taken], reasons=why)
        self._retry(taken, {f.id: f"the flush was refused: {why}" for f in taken})

    def _reject(self, facts: Sequence[StoredFact], reasons: dict[str, str]) -> None:
        with self.store.transaction():
            for fact in facts:
                self.store.move(fact.id, State.REJECTED, reason=reasons[fact.id])
                self.store.add_edit(fact.id, "weights", None, 0.0, "rejected", None)

    def _retry(self, facts: Sequence[StoredFact], reasons: dict[str, str]) -> None:
        with self.store.transaction():
            for fact in facts:
                self.retry(fact, "weights", reasons[fact.id])

    def retry(self, fact: StoredFact, tier: str, reason: str) -> None:
        """Let a waiting fact try the other tier, or fail after too many attempts.

        A fact that is live in the side memory simply stays there. Inside a transaction.
        """
        self.store.add_edit(fact.id, tier, None, 0.0, "failed", None)
        self.store.event("edit_failed", fact.id, tier=tier, reason=reason)
        if fact.state is State.RECEIVED and self.store.attempted(fact.id) >= self.attempts:
            self.store.move(fact.id, State.FAILED, reason=reason)

    def older(self, fact: StoredFact) -> list[StoredFact]:
        """The active facts that this one takes the place of."""
        return older_in_slot(fact, self.store.facts(ACTIVE, slot=fact.fact.slot))

    def supersede(self, fact: StoredFact) -> None:
        """End what the fact takes the place of. Inside a transaction."""
        for old in self.older(fact):
            self.store.drop_side(old.id)
            self.store.move(old.id, State.SUPERSEDED, reason=f"superseded by {fact.id}")
