"""Changes of the weights: each solves for a set of facts, to take facts out, go back, consolidate.

A candidate is loaded into the model, measured and probed, written to a file, and made the active
generation by one transaction together with the states of the facts it concerns. If anything goes
wrong before that transaction, the model returns to the active generation.
"""

import math
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kedit_daemon.editing.capacity_log import CapacityLog
from kedit_daemon.editing.fact_lifecycle import FactRemoval, Lifecycle
from kedit_daemon.editing.live_model import LiveModel
from memory.db import meta_keys
from memory.db.rows import StoredFact
from memory.db.store import Store
from memory.errors import KeditError, Unsolvable
from memory.facts import ACTIVE_STATES, Fact, FactState
from memory.files import save_tensors
from memory.model.canary import Health
from memory.model.generate import generate_answers
from policies.health_limits import Action, Thresholds, Verdict, find_worsened, judge_health
from policies.probe import count_answer_tokens, is_right_answer


@dataclass(frozen=True)
class Candidate:
    """Weights that were solved for a set of facts, and their health. They are not active yet."""

    fact_ids: tuple[str, ...]
    deltas: dict[int, Tensor]  # ΔW (hidden, width) by layer
    health: Health
    verdict: Verdict


class Generations:
    """Makes candidate weights, and activates one as the next generation."""

    def __init__(
        self, live_model: LiveModel, store: Store, lifecycle: Lifecycle, thresholds: Thresholds
    ) -> None:
        self.live_model, self.store, self.lifecycle = live_model, store, lifecycle
        self.model, self.thresholds = live_model.model, thresholds
        self.capacity_log = CapacityLog(store, thresholds)

    # Candidates ---------------------------------------------------------------------------------

    @contextmanager
    def serve_candidates(self) -> Iterator[None]:
        """Return to the active generation after the block, in which candidates are made."""
        before = self.store.artifacts.active_generation()
        try:
            yield
        finally:
            if self.store.artifacts.active_generation() == before:
                self.model.set_deltas(self.live_model.active_deltas)

    @contextmanager
    def try_candidate(self, ids: Sequence[str]) -> Iterator[Candidate]:
        """Serve a candidate within the block; it stays only if it was activated there."""
        with self.serve_candidates():
            yield self.make_candidate(ids)

    def make_candidate(self, ids: Sequence[str]) -> Candidate:
        """Solve for a set of facts, load the result into the model and measure it. Use it within
        `serve_candidates`. Raises Unsolvable."""
        deltas = self.solve(ids)
        return Candidate(tuple(ids), deltas, *self.measure_health())

    def solve(self, ids: Sequence[str]) -> dict[int, Tensor]:
        """Solve for a set of facts and load the result into the model."""
        deltas = self.live_model.solve(ids)
        self.model.set_deltas(deltas)
        return deltas

    def _hash_weights(self) -> str:
        return self.model.weights_hash(self.live_model.loaded_model.layers)

    def measure_health(self) -> tuple[Health, Verdict]:
        """Measure the weights as they are in the model."""
        health = self.live_model.loaded_model.canary.measure_health()
        return health, judge_health(health, self.thresholds)

    def judge_facts(self, ids: Sequence[str]) -> Verdict:
        """Judge a candidate with just these facts; it is left in the model."""
        try:
            return self.make_candidate(ids).verdict
        except Unsolvable as error:
            return Verdict(Action.REVERT, (str(error),))

    def measure_strain(self, fact_id: str) -> float:
        """Compute the largest ‖ΔW‖_F over ‖W0‖_F of a fact alone; infinite if it is unsolvable."""
        try:
            deltas = self.live_model.solve([fact_id])
        except Unsolvable:
            return math.inf
        ratios = (d.norm() / self.model.base_weight(n).norm() for n, d in deltas.items())
        return max(map(float, ratios), default=0.0)

    def pulse_with_active(self, pulse: Callable[[], None]) -> None:
        """Pulse between two candidates with the active generation in the model: no candidate may
        answer a request. It is left there."""
        self.model.set_deltas(self.live_model.active_deltas)
        pulse()

    def activate_candidate(
        self,
        candidate: Candidate,
        reason: str,
        moves: Callable[[int], None],
        gone: Container[str] = (),
    ) -> int:
        """Make a candidate the active generation, with `moves(generation)` in one transaction.

        So are the facts of the side memory that do not hold over the new weights taken out of it,
        to be learned again: at no time does a wrong one answer. `gone`: facts that `moves` takes
        out of it.
        """
        deltas, sha = candidate.deltas, None
        self.model.set_deltas(deltas)
        lost = self._find_lost_beside(candidate.fact_ids, gone)
        if deltas:
            tensors = {str(n): delta for n, delta in deltas.items()}
            sha = save_tensors(self.live_model.home.generations_folder, tensors)
        weights = self._hash_weights()
        parent, ids = self.store.artifacts.active_generation(), sorted(candidate.fact_ids)
        is_smaller = len(ids) < len(self.live_model.list_weights_facts())
        with self.store.db.transaction():
            number = self.store.artifacts.add_generation(
                sha, weights, parent, reason, ids, candidate.health.as_dict()
            )
            self.store.artifacts.activate_generation(number)
            self.store.db.set_meta(meta_keys.FLUSH_HELD, None)
            if is_smaller:
                self.capacity_log.forget_trials()
            self.capacity_log.record_capacity()
            moves(number)
            for fact in self.store.list_facts((FactState.LIVE_SIDE,)):
                if fact.id in lost:
                    self.store.artifacts.drop_side_keys(fact.id)
                    why = "the weights moved under it"
                    self.store.change_state(fact.id, FactState.RECEIVED, reason=why)
        self.live_model.active_deltas = deltas
        self.live_model.prune_side()
        return number

    def _find_lost_beside(self, in_weights: Container[str], gone: Container[str]) -> set[str]:
        """Find the facts of the side memory that do not hold over the weights in the model."""
        side = self.live_model.side
        facts = [
            f
            for f in self.store.list_facts(ACTIVE_STATES)
            if f.id in side.shard_ids and f.id not in in_weights and f.id not in gone
        ]
        hidden = side.hidden_facts
        # No fact that leaves may fire for one that stays.
        side.hidden_facts = {n for n in side.shard_ids if n in gone or n in hidden}
        try:
            answers = self.live_model.answer_questions([f.fact for f in facts])
        finally:
            side.hidden_facts = hidden
        pairs = zip(facts, answers, strict=True)
        return {f.id for f, answer in pairs if not is_right_answer(answer.text, f.fact)}

    # Taking out ---------------------------------------------------------------------------------

    def remove_facts(
        self, facts: Sequence[StoredFact], state: FactState, reason: str, dry_run: bool = False
    ) -> dict[str, Any]:
        """End active facts: the weights are solved again without them, at once and exactly."""
        removals = [FactRemoval(f, state, reason) for f in facts]
        return self.apply_removals(removals, reason, dry_run=dry_run)

    def move_to_side(self, facts: Sequence[StoredFact], reason: str) -> None:
        """Take live facts out of their tier, and learn them again in the side memory."""
        removals = [FactRemoval(fact, FactState.RECEIVED, reason) for fact in facts]
        self.apply_removals(removals, reason, also=lambda: self.lifecycle.redirect_to_side(facts))

    def apply_removals(
        self,
        removals: Sequence[FactRemoval],
        reason: str,
        *,
        dry_run: bool = False,
        also: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Solve the weights again without some facts. `reason` is the generation's; `also` runs
        in the same transaction."""
        gone = {one.fact.id for one in removals}
        ids = [n for n in self.live_model.list_weights_facts() if n not in gone]
        return self._apply_change(ids, removals, [], reason, dry_run, also)

    def restore_generation(self, generation: int, dry_run: bool) -> dict[str, Any]:
        """Make the weights hold the facts of an earlier generation again.

        Facts that came into the weights since are reverted; what ended since lives again.
        """
        wanted = set(self.store.artifacts.get_generation(generation).fact_ids)
        current = set(self.live_model.list_weights_facts())
        back = [self._require_fact(n) for n in sorted(wanted - current)]
        slots = {f.fact.slot for f in back}
        out = [self._require_fact(n) for n in sorted(current - wanted)]
        out += [
            f
            for f in self.store.list_facts(ACTIVE_STATES)
            if f.fact.slot in slots and f not in out and f.id not in wanted
        ]
        reason = f"back to generation {generation}"
        removals = [FactRemoval(f, FactState.REVERTED, reason) for f in out]
        return self._apply_change(sorted(wanted), removals, back, reason, dry_run, lambda: None)

    def _require_fact(self, fact_id: str) -> StoredFact:
        fact = self.store.find_fact(fact_id)
        if fact is None:
            raise KeditError(f"there is no fact {fact_id}", code="unknown-fact")
        return fact

    def _apply_change(
        self,
        ids: list[str],
        out: Sequence[FactRemoval],
        back: list[StoredFact],
        reason: str,
        dry_run: bool,
        also: Callable[[], None],
    ) -> dict[str, Any]:
        """Make the weights hold the facts `ids`, with `out` removed and `back` restored."""
        asked = [*(one.fact.fact for one in out), *(f.fact for f in back)]
        before = self._answer(asked)
        generation = self.store.artifacts.active_generation()
        self.live_model.side.hidden_facts = {one.fact.id for one in out}

        def move_facts(number: int) -> None:
            self.lifecycle.remove_facts(out, after)
            self.lifecycle.restore_facts(back, number, reason, after)
            also()

        try:
            with self.try_candidate(ids) as candidate:
                after = self._answer(asked)
                weights = self._hash_weights()
                if not dry_run and not self._move_if_unchanged(ids, move_facts):
                    generation = self.activate_candidate(candidate, reason, move_facts)
        finally:
            self.live_model.side.hidden_facts = set()
        if not dry_run:
            self.live_model.prune_side()
        return {
            "reverted": [one.fact.id for one in out],
            "restored": [f.id for f in back],
            "generation": generation,
            "weights_hash": weights,
            "answers": {f.id: {"before": before[f.id], "after": after[f.id]} for f in asked},
            "figures": candidate.health.as_dict(),
            "verdict": str(candidate.verdict.action),
            "dry_run": dry_run,
        }

    def _answer(self, facts: Sequence[Fact]) -> dict[str, str]:
        """Answer the facts' questions by the edited model, by fact id."""
        return {n: answers[0] for n, answers in self.live_model.probe_edited(facts).items()}

    def _move_if_unchanged(self, ids: Sequence[str], moves: Callable[[int], None]) -> bool:
        """Check that the weights hold just these facts, in any order. If so, run `moves` with the
        active generation: no other is needed."""
        unchanged = sorted(ids) == sorted(self.live_model.list_weights_facts())
        if unchanged:
            with self.store.db.transaction():
                moves(self.store.artifacts.active_generation())
        return unchanged

    def solve_without(
        self, gone: Container[str], reason: str, moves: Callable[[int], None]
    ) -> None:
        """Take the facts `gone`, which `moves` ends, out of the weights in the same transaction."""
        ids = [n for n in self.live_model.list_weights_facts() if n not in gone]
        if not self._move_if_unchanged(ids, moves):
            with self.try_candidate(ids) as candidate:
                self.activate_candidate(candidate, reason, moves, gone)

    # Consolidation ------------------------------------------------------------------------------

    def consolidate(self, dry_run: bool) -> dict[str, Any]:
        """Solve again from W0 for all facts in the weights; activate it if nothing gets worse."""
        ids = self.live_model.list_weights_facts()
        active = self.store.artifacts.get_generation(self.store.artifacts.active_generation())
        (before, verdict), served = self.measure_health(), self._hash_weights()
        reasons, generation = list[str](), active.id
        with self.serve_candidates():
            deltas, weights = self.solve(ids), self._hash_weights()
            # The same weights have the same figures.
            measured = (before, verdict) if weights == served else self.measure_health()
            candidate = Candidate(tuple(ids), deltas, *measured)
            changed = active.sha256 is not None and weights != active.weights_hash
            if changed:
                reasons = [*find_worsened(before, candidate.health)]
                reasons += self._describe_lost(candidate)
            if changed and not dry_run and not reasons:
                generation = self.activate_candidate(candidate, "consolidated", lambda _n: None)
        return {
            "generation": generation,
            "weights_hash": weights,
            "facts": len(ids),
            "changed": changed,
            "taken": generation != active.id,
            "before": before.as_dict(),
            "figures": candidate.health.as_dict(),
            "verdict": str(candidate.verdict.action),
            "reasons": reasons,
            "dry_run": dry_run,
        }

    def _describe_lost(self, candidate: Candidate) -> list[str]:
        """Describe how many facts the active weights state and the candidate, which is in the
        model, does not."""
        facts = [self._require_fact(n).fact for n in candidate.fact_ids]
        stated = self._find_stated(facts)
        self.model.set_deltas(self.live_model.active_deltas)
        lost = self._find_stated(facts) - stated
        self.model.set_deltas(candidate.deltas)
        return [f"{len(lost)} facts would not be stated any more"] if lost else []

    def _find_stated(self, facts: Sequence[Fact]) -> set[str]:
        """Find the facts that the weights alone state, by id."""
        most = count_answer_tokens(self.model, facts)
        answers = generate_answers(self.model, [f.question for f in facts], most)
        pairs = zip(facts, answers, strict=True)
        return {f.id for f, text in pairs if is_right_answer(text, f)}
