"""Changes of the weights: taking facts out, going back, consolidating. Each is a set, solved.

A change is tried on the model, probed and measured, written to a file, and made the active
generation by one transaction together with the states of the facts it concerns. If anything goes
wrong before that transaction, the model returns to the active generation.
"""

import math
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from kedit_daemon.editing.capacity_log import CapacityLog
from kedit_daemon.editing.live_model import LiveModel
from memory.db import meta_keys
from memory.db.rows import StoredFact
from memory.errors import KeditError, Unsolvable
from memory.facts import ACTIVE_STATES, Fact, FactState
from memory.files import save_tensors
from memory.model.canary import Health
from memory.model.generate import generate_answers
from policies.probe import count_answer_tokens, is_same_answer
from policies.routing import is_for_batch
from policies.stability import Action, Thresholds, Verdict, find_worsened, judge_health


@dataclass(frozen=True)
class FactRemoval:
    """A fact that is taken out, what becomes of it, and why."""

    fact: StoredFact
    state: FactState
    reason: str


class Generations:
    """The one way to change what generation is served."""

    def __init__(self, served: LiveModel, thresholds: Thresholds) -> None:
        self.live_model, self.store, self.model = served, served.store, served.model
        self.thresholds = thresholds
        self.capacity_log = CapacityLog(self.store, thresholds)
        self._candidate_deltas: dict[int, Tensor] = {}
        self._candidate_ids: list[str] | None = None  # what the candidate holds, while it is served

    @contextmanager
    def serve_candidates(self) -> Iterator[None]:
        """Serve what is solved within the block; it stays only if `publish` was run."""
        before, self._candidate_ids = self.store.artifacts.active_generation(), None
        try:
            yield
        finally:
            self._candidate_ids = None
            if self.store.artifacts.active_generation() == before:
                self.model.set_deltas(self.live_model.active_deltas)

    @contextmanager
    def try_candidate(self, ids: Sequence[str]) -> Iterator[None]:
        """Serve a candidate set of facts within the block; it stays only if `publish` was run."""
        with self.serve_candidates():
            self.solve(ids)
            yield

    def activate_candidate(
        self, ids: Sequence[str], reason: str, health: Health, moves: Callable[[int], None]
    ) -> int:
        """Make the candidate the active generation, with `moves(generation)` in one transaction."""
        deltas, sha = self._candidate_deltas, None
        if deltas:
            tensors = {str(n): delta for n, delta in deltas.items()}
            sha = save_tensors(self.live_model.home.generations_folder, tensors)
        weights = self.model.weights_hash(self.live_model.loaded_model.layers)
        parent, held = (
            self.store.artifacts.active_generation(),
            len(self.live_model.list_weights_facts()),
        )
        with self.store.db.transaction():
            number = self.store.artifacts.add_generation(
                sha, weights, parent, reason, sorted(ids), health.as_dict()
            )
            self.store.artifacts.activate_generation(number)
            self.store.db.set_meta(meta_keys.FLUSH_HELD, None)
            if len(ids) < held:
                self.capacity_log.forget_trials()
            self.capacity_log.record_capacity()
            moves(number)
            if self.store.list_facts((FactState.LIVE_SIDE,)):
                self.store.db.set_meta(meta_keys.SIDE_UNCHECKED, str(number))
        self.live_model.active_deltas = deltas
        self.recheck_side()
        return number

    def recheck_side(self) -> None:
        """Let what no longer holds in the side memory, on weights that have moved, be relearned."""
        self.live_model.prune_side()  # first: no fact that has left may fire for a live one
        if self.store.db.get_meta(meta_keys.SIDE_UNCHECKED) is None:
            return
        live = self.store.list_facts((FactState.LIVE_SIDE,))
        most = count_answer_tokens(self.model, [f.fact for f in live]) if live else 0
        said = self.live_model.answer_prompts([f.fact.question for f in live], most) if live else []
        with self.store.db.transaction():
            for fact, answer in zip(live, said, strict=True):
                if not is_same_answer(answer.text, fact.fact.target):
                    self.store.artifacts.drop_side_keys(fact.id)
                    self.store.change_state(
                        fact.id, FactState.RECEIVED, reason="the weights moved under it"
                    )
            self.store.db.set_meta(meta_keys.SIDE_UNCHECKED, None)
        self.live_model.prune_side()

    def solve(self, ids: Sequence[str]) -> None:
        """Serve the weights with just these facts, among candidates."""
        if ids != self._candidate_ids:
            self._candidate_deltas = self.live_model.solve(ids)
            self.model.set_deltas(self._candidate_deltas)
            self._candidate_ids = list(ids)

    def pulse_with_active(self, pulse: Callable[[], None]) -> None:
        """A pulse between two candidates, with what is published in its place: who asks meanwhile
        must not be answered by a candidate."""
        self.model.set_deltas(self.live_model.active_deltas)
        pulse()
        if self._candidate_ids is not None:
            self.model.set_deltas(self._candidate_deltas)

    def judge_facts(self, ids: Sequence[str]) -> Verdict:
        """What would be said of the weights with just these facts; they stay so."""
        try:
            self.solve(ids)
        except Unsolvable as error:
            return Verdict(Action.REVERT, (str(error),))
        return self.measure_health()[1]

    def measure_strain(self, fact_id: str) -> float:
        """How much a fact asks of the weights all by itself: the largest ‖ΔW‖_F over ‖W0‖_F;
        infinite where it cannot be solved."""
        try:
            deltas = self.live_model.solve([fact_id])
        except Unsolvable:
            return math.inf
        asked = (d.norm() / self.model.base_weight(n).norm() for n, d in deltas.items())
        return max(map(float, asked), default=0.0)

    def measure_health(self) -> tuple[Health, Verdict]:
        health = self.live_model.loaded_model.canary.measure_health()
        return health, judge_health(health, self.thresholds)

    # Taking out ---------------------------------------------------------------------------------

    def remove_facts(
        self, facts: Sequence[StoredFact], state: FactState, reason: str, dry_run: bool = False
    ) -> dict[str, Any]:
        """End active facts: the weights are solved again without them, at once and exactly."""
        return self.apply_removals(
            [FactRemoval(f, state, reason) for f in facts], reason, dry_run=dry_run
        )

    def apply_removals(
        self,
        leaving: Sequence[FactRemoval],
        reason: str,
        *,
        dry_run: bool = False,
        also: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Solve the weights again without some facts. `reason` is the generation's; `also` is done
        in the same transaction."""
        gone = {one.fact.id for one in leaving}
        ids = [n for n in self.live_model.list_weights_facts() if n not in gone]
        return self._apply_change(ids, leaving, [], reason, dry_run, also)

    def redirect_to_side(self, facts: Sequence[StoredFact]) -> None:
        """Let facts that wait now be for the side memory. Inside a transaction."""
        for fact in facts:
            now = self.store.find_fact(fact.id)
            if now is not None and is_for_batch(now):
                self.store.send_to_side(fact.id, "sent_beside")

    def send_to_side(self, facts: Sequence[StoredFact], why: str) -> None:
        """Take live facts out of where they are, and let them wait for the side memory."""
        leaving = [FactRemoval(fact, FactState.RECEIVED, why) for fact in facts]
        self.apply_removals(leaving, why, also=lambda: self.redirect_to_side(facts))

    def restore_generation(self, generation: int, dry_run: bool) -> dict[str, Any]:
        """Make the weights hold the facts of an earlier generation again.

        Facts that came into the weights since are reverted; what ended since lives again.
        """
        wanted = set(self.store.artifacts.get_generation(generation).fact_ids)
        current = set(self.live_model.list_weights_facts())
        out = [self._require_fact(n) for n in sorted(current - wanted)]
        back = [self._require_fact(n) for n in sorted(wanted - current)]
        slots = {f.fact.slot for f in back}
        out += [
            f for f in self.store.list_facts(ACTIVE_STATES) if f.fact.slot in slots and f not in out
        ]
        out = [f for f in out if f.id not in wanted]
        reason = f"back to generation {generation}"
        leaving = [FactRemoval(f, FactState.REVERTED, reason) for f in out]
        return self._apply_change(sorted(wanted), leaving, back, reason, dry_run, lambda: None)

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
        asked = [*(one.fact.fact for one in out), *(f.fact for f in back)]
        before = self.live_model.probe_edited(asked)
        self.live_model.side.hidden_facts = {one.fact.id for one in out}
        try:
            with self.try_candidate(ids):
                after = self.live_model.probe_edited(asked)
                health, verdict = self.measure_health()
                weights = self.model.weights_hash(self.live_model.loaded_model.layers)
                generation = self.store.artifacts.active_generation()
                if not dry_run:
                    moves = partial(self._move_facts, out, back, reason, after, also)
                    generation = self._activate_if_changed(ids, reason, health, moves)
        finally:
            self.live_model.side.hidden_facts = set()
        if not dry_run:
            self.live_model.prune_side()
        return {
            "reverted": [one.fact.id for one in out],
            "restored": [f.id for f in back],
            "generation": generation,
            "weights_hash": weights,
            "answers": {f.id: {"before": before[f.id][0], "after": after[f.id][0]} for f in asked},
            "figures": health.as_dict(),
            "verdict": str(verdict.action),
            "dry_run": dry_run,
        }

    def _activate_if_changed(
        self, ids: list[str], reason: str, health: Health, moves: Callable[[int], None]
    ) -> int:
        if self._move_if_unchanged(ids, moves):
            return self.store.artifacts.active_generation()
        return self.activate_candidate(ids, reason, health, moves)

    def _move_if_unchanged(self, ids: Sequence[str], moves: Callable[[int], None]) -> bool:
        """Whether the weights hold just these facts, in whatever order; then no other generation
        is made, and the moves are done."""
        held = sorted(ids) == sorted(self.live_model.list_weights_facts())
        if held:
            with self.store.db.transaction():
                moves(self.store.artifacts.active_generation())
        return held

    def _move_facts(
        self,
        out: Sequence[FactRemoval],
        back: Sequence[StoredFact],
        reason: str,
        after: dict[str, list[str]],
        also: Callable[[], None],
        number: int,
    ) -> None:
        """Move the facts of a change that makes a generation. Inside a transaction."""
        for one in out:
            fact_id = one.fact.id
            self.store.artifacts.drop_side_keys(fact_id)
            self.store.change_state(fact_id, one.state, reason=one.reason, after=after[fact_id][0])
        for fact in back:
            self.store.artifacts.drop_side_keys(fact.id)  # it may have been learned there since
            self.store.change_state(
                fact.id,
                FactState.LIVE_WEIGHTS,
                tier="weights",
                generation=number,
                reason=reason,
                after=after[fact.id][0],
            )
        also()

    def solve_without(
        self, gone: Container[str], reason: str, moves: Callable[[int], None]
    ) -> None:
        """Serve the weights without facts that `moves` ends, if they hold any of these, and do
        that in the same transaction."""
        ids = [n for n in self.live_model.list_weights_facts() if n not in gone]
        if self._move_if_unchanged(ids, moves):
            return
        with self.try_candidate(ids):
            self.activate_candidate(ids, reason, self.measure_health()[0], moves)

    # Consolidation ------------------------------------------------------------------------------

    def consolidate(self, dry_run: bool) -> dict[str, Any]:
        """Solve again from W0 over all facts in the weights; taken if nothing gets worse."""
        ids = self.live_model.list_weights_facts()
        active = self.store.artifacts.get_generation(self.store.artifacts.active_generation())
        was, reasons, generation = self.measure_health()[0], list[str](), active.id
        with self.try_candidate(ids):
            health, verdict = self.measure_health()
            weights = self.model.weights_hash(self.live_model.loaded_model.layers)
            changed = active.sha256 is not None and weights != active.weights_hash
            if changed:
                reasons = [*find_worsened(was, health), *self._describe_lost(ids)]
            if changed and not dry_run and not reasons:
                generation = self.activate_candidate(ids, "consolidated", health, lambda _n: None)
        return {
            "generation": generation,
            "weights_hash": weights,
            "facts": len(ids),
            "changed": changed,
            "taken": generation != active.id,
            "before": was.as_dict(),
            "figures": health.as_dict(),
            "verdict": str(verdict.action),
            "reasons": reasons,
            "dry_run": dry_run,
        }

    def _describe_lost(self, ids: Sequence[str]) -> list[str]:
        """In words, how many facts the active weights state and the candidate does not."""
        facts = [self._require_fact(n).fact for n in ids]
        now = self._find_stated(facts)
        self.model.set_deltas(self.live_model.active_deltas)
        lost = self._find_stated(facts) - now
        self.model.set_deltas(self._candidate_deltas)
        return [f"{len(lost)} facts would not be stated any more"] if lost else []

    def _find_stated(self, facts: Sequence[Fact]) -> set[str]:
        """Which of these facts the weights as they are state, by id."""
        said = generate_answers(
            self.model, [f.question for f in facts], count_answer_tokens(self.model, facts)
        )
        return {f.id for f, text in zip(facts, said, strict=True) if is_same_answer(text, f.target)}
