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

from kedit_daemon.editing.capacity_log import Room
from kedit_daemon.editing.live_model import Served
from memory.db.rows import StoredFact
from memory.errors import KeditError
from memory.facts import ACTIVE, Fact, State
from memory.files import save_tensors
from memory.model.canary import Health
from memory.model.generate import answers
from policies.probe import longest_target, same
from policies.routing import wants_batch
from policies.solver import UNSOLVED
from policies.stability import Action, Thresholds, Verdict, judge, worse

UNCHECKED = "side_unchecked"  # in the store's meta: the weights have moved under the side memory
HELD = "flush_held"  # why flushes wait for a person or for room; in the store's meta


@dataclass(frozen=True)
class Leaving:
    """A fact that is taken out, what becomes of it, and why."""

    fact: StoredFact
    state: State
    reason: str


class Weights:
    """The one way to change what generation is served."""

    def __init__(self, served: Served, thresholds: Thresholds) -> None:
        self.served, self.store, self.model = served, served.store, served.model
        self.thresholds = thresholds
        self.room = Room(self.store, thresholds)
        self._candidate: dict[int, Tensor] = {}
        self._solved: list[str] | None = None  # what the candidate holds, while it is served

    @contextmanager
    def candidates(self) -> Iterator[None]:
        """Serve what is solved within the block; it stays only if `publish` was run."""
        before, self._solved = self.store.active_generation(), None
        try:
            yield
        finally:
            self._solved = None
            if self.store.active_generation() == before:
                self.model.set_deltas(self.served.deltas)

    @contextmanager
    def trial(self, ids: Sequence[str]) -> Iterator[None]:
        """Serve a candidate set of facts within the block; it stays only if `publish` was run."""
        with self.candidates():
            self.solve(ids)
            yield

    def publish(
        self, ids: Sequence[str], reason: str, health: Health, moves: Callable[[int], None]
    ) -> int:
        """Make the candidate the active generation, with `moves(generation)` in one transaction."""
        deltas, sha = self._candidate, None
        if deltas:
            tensors = {str(n): delta for n, delta in deltas.items()}
            sha = save_tensors(self.served.home.generations, tensors)
        weights = self.model.weights_hash(self.served.loaded.layers)
        parent, held = self.store.active_generation(), len(self.served.weights_facts())
        with self.store.transaction():
            number = self.store.add_generation(
                sha, weights, parent, reason, sorted(ids), health.as_dict()
            )
            self.store.activate(number)
            self.store.set_meta(HELD, None)
            if len(ids) < held:
                self.room.forget_trials()
            self.room.remember()
            moves(number)
            if self.store.facts((State.LIVE_SIDE,)):
                self.store.set_meta(UNCHECKED, str(number))
        self.served.deltas = deltas
        self.recheck()
        return number

    def recheck(self) -> None:
        """Let what no longer holds in the side memory, on weights that have moved, be relearned."""
        self.served.forget_side()  # first: no fact that has left may fire for a live one
        if self.store.meta(UNCHECKED) is None:
            return
        live = self.store.facts((State.LIVE_SIDE,))
        most = longest_target(self.model, [f.fact for f in live]) if live else 0
        said = self.served.ask([f.fact.question for f in live], most) if live else []
        with self.store.transaction():
            for fact, answer in zip(live, said, strict=True):
                if not same(answer.text, fact.fact.target):
                    self.store.drop_side(fact.id)
                    self.store.move(fact.id, State.RECEIVED, reason="the weights moved under it")
            self.store.set_meta(UNCHECKED, None)
        self.served.forget_side()

    def solve(self, ids: Sequence[str]) -> None:
        """Serve the weights with just these facts, among candidates."""
        if ids != self._solved:
            self._candidate = self.served.solve(ids)
            self.model.set_deltas(self._candidate)
            self._solved = list(ids)

    def breathe(self, pulse: Callable[[], None]) -> None:
        """A pulse between two candidates, with what is published in its place: who asks meanwhile
        must not be answered by a candidate."""
        self.model.set_deltas(self.served.deltas)
        pulse()
        if self._solved is not None:
            self.model.set_deltas(self._candidate)

    def verdict_on(self, ids: Sequence[str]) -> Verdict:
        """What would be said of the weights with just these facts; they stay so."""
        try:
            self.solve(ids)
        except KeditError as error:
            if error.code not in UNSOLVED:
                raise
            return Verdict(Action.REVERT, (str(error),))
        return self.measured()[1]

    def strain(self, fact_id: str) -> float:
        """How much a fact asks of the weights all by itself: the largest ‖ΔW‖_F over ‖W0‖_F;
        infinite where it cannot be solved."""
        try:
            deltas = self.served.solve([fact_id])
        except KeditError as error:
            if error.code not in UNSOLVED:
                raise
            return math.inf
        asked = (d.norm() / self.model.base_weight(n).norm() for n, d in deltas.items())
        return max(map(float, asked), default=0.0)

    def measured(self) -> tuple[Health, Verdict]:
        health = self.served.loaded.canary.measure()
        return health, judge(health, self.thresholds)

    # Taking out ---------------------------------------------------------------------------------

    def take_out(
        self, facts: Sequence[StoredFact], state: State, reason: str, dry_run: bool = False
    ) -> dict[str, Any]:
        """End active facts: the weights are solved again without them, at once and exactly."""
        return self.part_with([Leaving(f, state, reason) for f in facts], reason, dry_run=dry_run)

    def part_with(
        self,
        leaving: Sequence[Leaving],
        reason: str,
        *,
        dry_run: bool = False,
        also: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Solve the weights again without some facts. `reason` is the generation's; `also` is done
        in the same transaction."""
        gone = {one.fact.id for one in leaving}
        ids = [n for n in self.served.weights_facts() if n not in gone]
        return self._change(ids, leaving, [], reason, dry_run, also)

    def wait_beside(self, facts: Sequence[StoredFact]) -> None:
        """Let facts that wait now be for the side memory. Inside a transaction."""
        for fact in facts:
            now = self.store.fact(fact.id)
            if now is not None and wants_batch(now):
                self.store.send_beside(fact.id, "sent_beside")

    def send_beside(self, facts: Sequence[StoredFact], why: str) -> None:
        """Take live facts out of where they are, and let them wait for the side memory."""
        leaving = [Leaving(fact, State.RECEIVED, why) for fact in facts]
        self.part_with(leaving, why, also=lambda: self.wait_beside(facts))

    def go_back(self, generation: int, dry_run: bool) -> dict[str, Any]:
        """Make the weights hold the facts of an earlier generation again.

        Facts that came into the weights since are reverted; what ended since lives again.
        """
        wanted = set(self.store.generation(generation).fact_ids)
        current = set(self.served.weights_facts())
        out = [self._must(n) for n in sorted(current - wanted)]
        back = [self._must(n) for n in sorted(wanted - current)]
        slots = {f.fact.slot for f in back}
        out += [f for f in self.store.facts(ACTIVE) if f.fact.slot in slots and f not in out]
        out = [f for f in out if f.id not in wanted]
        reason = f"back to generation {generation}"
        leaving = [Leaving(f, State.REVERTED, reason) for f in out]
        return self._change(sorted(wanted), leaving, back, reason, dry_run, lambda: None)

    def _must(self, fact_id: str) -> StoredFact:
        fact = self.store.fact(fact_id)
        if fact is None:
            raise KeditError(f"there is no fact {fact_id}", code="unknown-fact")
        return fact

    def _change(
        self,
        ids: list[str],
        out: Sequence[Leaving],
        back: list[StoredFact],
        reason: str,
        dry_run: bool,
        also: Callable[[], None],
    ) -> dict[str, Any]:
        asked = [*(one.fact.fact for one in out), *(f.fact for f in back)]
        before = self.served.probe_after(asked)
        self.served.side.hidden = {one.fact.id for one in out}
        try:
            with self.trial(ids):
                after = self.served.probe_after(asked)
                health, verdict = self.measured()
                weights = self.model.weights_hash(self.served.loaded.layers)
                generation = self.store.active_generation()
                if not dry_run:
                    moves = partial(self._moved, out, back, reason, after, also)
                    generation = self._ended(ids, reason, health, moves)
        finally:
            self.served.side.hidden = set()
        if not dry_run:
            self.served.forget_side()
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

    def _ended(
        self, ids: list[str], reason: str, health: Health, moves: Callable[[int], None]
    ) -> int:
        if self._held(ids, moves):
            return self.store.active_generation()
        return self.publish(ids, reason, health, moves)

    def _held(self, ids: Sequence[str], moves: Callable[[int], None]) -> bool:
        """Whether the weights hold just these facts, in whatever order; then no other generation
        is made, and the moves are done."""
        held = sorted(ids) == sorted(self.served.weights_facts())
        if held:
            with self.store.transaction():
                moves(self.store.active_generation())
        return held

    def _moved(
        self,
        out: Sequence[Leaving],
        back: Sequence[StoredFact],
        reason: str,
        after: dict[str, list[str]],
        also: Callable[[], None],
        number: int,
    ) -> None:
        """Move the facts of a change that makes a generation. Inside a transaction."""
        for one in out:
            fact_id = one.fact.id
            self.store.drop_side(fact_id)
            self.store.move(fact_id, one.state, reason=one.reason, after=after[fact_id][0])
        for fact in back:
            self.store.drop_side(fact.id)  # it may have been learned there since
            self.store.move(
                fact.id,
                State.LIVE_WEIGHTS,
                tier="weights",
                generation=number,
                reason=reason,
                after=after[fact.id][0],
            )
        also()

    def leave(self, gone: Container[str], reason: str, moves: Callable[[int], None]) -> None:
        """Serve the weights without facts that `moves` ends, if they hold any of these, and do
        that in the same transaction."""
        ids = [n for n in self.served.weights_facts() if n not in gone]
        if self._held(ids, moves):
            return
        with self.trial(ids):
            self.publish(ids, reason, self.measured()[0], moves)

    # Consolidation ------------------------------------------------------------------------------

    def consolidate(self, dry_run: bool) -> dict[str, Any]:
        """Solve again from W0 over all facts in the weights; taken if nothing gets worse."""
        ids = self.served.weights_facts()
        active = self.store.generation(self.store.active_generation())
        was, reasons, generation = self.measured()[0], list[str](), active.id
        with self.trial(ids):
            health, verdict = self.measured()
            weights = self.model.weights_hash(self.served.loaded.layers)
            changed = active.sha256 is not None and weights != active.weights_hash
            if changed:
                reasons = [*worse(was, health), *self._unlearned(ids)]
            if changed and not dry_run and not reasons:
                generation = self.publish(ids, "consolidated", health, lambda _n: None)
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

    def _unlearned(self, ids: Sequence[str]) -> list[str]:
        """In words, how many facts the active weights state and the candidate does not."""
        facts = [self._must(n).fact for n in ids]
        now = self._stated(facts)
        self.model.set_deltas(self.served.deltas)
        lost = self._stated(facts) - now
        self.model.set_deltas(self._candidate)
        return [f"{len(lost)} facts would not be stated any more"] if lost else []

    def _stated(self, facts: Sequence[Fact]) -> set[str]:
        """Which of these facts the weights as they are state, by id."""
        said = answers(self.model, [f.question for f in facts], longest_target(self.model, facts))
        return {f.id for f, text in zip(facts, said, strict=True) if same(text, f.target)}
