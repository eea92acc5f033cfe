"""The edit loop's hands: what to do next with waiting facts, and what people and jobs ask for."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from kedit_daemon.config import Config
from kedit_daemon.editing.audit import Auditor, thresholds
from kedit_daemon.editing.flush import Flush
from kedit_daemon.editing.generations import HELD, Weights
from kedit_daemon.editing.live_model import Served
from kedit_daemon.editing.memory_backoff import REST, Rest
from kedit_daemon.editing.side_learner import Hot, cannot_learn
from memory.db.rows import StoredFact
from memory.errors import KeditError, ends
from memory.facts import ACTIVE, State
from memory.oom import SHORT, shortage_told
from memory.side.side_memory import Match
from policies.cooldown import Restraint
from policies.routing import flush_due, wants_batch

NO_ROOM = "there was no memory left for this fact alone"
log = logging.getLogger(__name__)


class Editor:
    """Everything that changes what the model says. One thread uses it."""

    def __init__(self, served: Served, config: Config, pulse: Callable[[], None]) -> None:
        self.served, self.store, self.config = served, served.store, config
        self.weights = Weights(served, thresholds(config, served.site))
        self.flush = Flush(self.weights, config.inbox.max_attempts, pulse)
        at = config.stability
        restraint = Restraint(at.cool_down_seconds, at.acts_a_day)
        self.auditor = Auditor(self.flush, restraint)
        self.hot = Hot(self.flush, config.side.batch_facts, config.side.steps, pulse)
        self.rest = Rest(self._now)

    def resume(self) -> None:
        """At the start: do what a crash came before, between two transactions of one change."""
        try:
            self.weights.recheck()
        except KeditError as error:
            if ends(error):
                raise
            # No reason to stay away: what is served is as it was.
            log.warning("a change that was cut short cannot be completed: %s", error)

    # The loop -----------------------------------------------------------------------------------

    def step(self) -> bool:
        """Do one piece of work that waits, if there is any."""
        if self.rest.goes_on():
            return False
        waiting = self.rest.in_turn(self._newest(self.store.facts((State.RECEIVED,))))
        tiers = [self._step_beside, self._step_batch]
        if self.rest.tier == "side":  # what finds no memory in one must not stop the other
            tiers.reverse()
        return any(work(waiting) for work in tiers)

    def _step_beside(self, waiting: list[StoredFact]) -> bool:
        for_side = [f for f in waiting if not wants_batch(f)]
        if for_side:
            self._learn(for_side)
        return bool(for_side)

    def _step_batch(self, waiting: list[StoredFact]) -> bool:
        for_batch = [f for f in waiting if wants_batch(f)]
        if no_room := self._without_room(for_batch):
            with self.store.transaction():
                self.flush.send_beside(no_room)
            return True
        if reason := self._due(for_batch):
            self._flush(reason)
            return True
        return False

    def _without_room(self, for_batch: list[StoredFact]) -> list[StoredFact]:
        """The facts that no batch would take: the weights are full, and they replace nothing."""
        if not for_batch or self._room() >= 1:
            return []
        return [f for f in for_batch if not self.flush.replaces(f)]

    def _room(self) -> float:
        return self.flush.room(self.weights.room.known())

    def _newest(self, waiting: list[StoredFact]) -> list[StoredFact]:
        """One fact a slot: one that was sent back to wait may have been superseded meanwhile."""
        newest = {f.fact.slot: f for f in waiting}
        outdated = [f for f in waiting if newest[f.fact.slot] is not f]
        if outdated:
            with self.store.transaction():
                for fact in outdated:
                    by = newest[fact.fact.slot].id
                    self.store.move(fact.id, State.SUPERSEDED, reason=f"superseded by {by}")
        return list(newest.values())

    def _learn(self, waiting: list[StoredFact]) -> None:
        """What cannot be learned together is tried fact by fact: one must not stop the rest.
        Where there is no memory for so many at once, it is half of them."""
        most = min(self.hot.batch_facts, len(waiting))
        while most > 1:
            error = self._unlearned(waiting, most)
            if error is None or self._moved(waiting, error):
                return
            if cannot_learn(error).code != SHORT:
                waiting = waiting[:1]
            most = min(most // 2, len(waiting))
        self._learn_alone(waiting[:2])

    def _learn_alone(self, facts: list[StoredFact]) -> None:
        """Try the first fact, and where there is no memory for it, the next; else rest."""
        short = list[StoredFact]()
        for fact in facts:
            error = self._unlearned([fact], 1)
            if error is None or self._moved([fact], error):
                break
            why = cannot_learn(error)
            log.warning("%s cannot be learned: %s", fact.id, why, exc_info=error)
            if why.code != SHORT:
                with self.store.transaction():
                    if why.code == "rejected":
                        self.store.move(fact.id, State.REJECTED, reason=str(why))
                    else:
                        self.flush.retry(fact, "side", str(why))
                break
            self.rest.lacks(fact.id)
            short.append(fact)
        blamed = self.rest.blamed(short)
        with self.store.transaction():
            for fact in blamed:
                self.flush.retry(fact, "side", NO_ROOM)
        if len(short) == len(facts):
            self._rest([f for f in short if f not in blamed], "side")

    def _unlearned(self, waiting: list[StoredFact], most: int) -> Exception | None:
        """Learn at most so many; why it cannot be done."""
        try:
            with self.spared():
                if self.hot.take(waiting, most):
                    self.rest.found()
        except (KeditError, ArithmeticError, RuntimeError, ValueError) as error:
            if ends(error):
                raise
            return error
        return None

    def _moved(self, waiting: list[StoredFact], error: Exception) -> bool:
        """Whether an error came after facts had been moved: none of them is to blame, and the next
        step sees what is left."""
        left = [f for f in self._still_there(waiting) if f.state is State.RECEIVED]
        moved = len(left) < len(waiting)
        if moved:
            log.warning("facts were moved, and then: %s", error, exc_info=error)
        return moved

    def _rest(self, facts: list[StoredFact], tier: str) -> None:
        """Try nothing for a while. It is no attempt at these facts, for which there was no memory
        alone; what came for a batch may find enough of it in the side memory."""
        log.warning("no edit for %g s: %s", REST.total_seconds(), NO_ROOM)
        self.rest.begin(tier, self.store.facts((State.RECEIVED, State.LIVE_SIDE)))
        with self.store.transaction():
            for fact in facts:
                self.store.event("edit_failed", fact.id, tier=tier, reason=NO_ROOM)
            if tier == "weights":
                self.weights.wait_beside(facts)

    def _now(self) -> datetime:
        return datetime.fromisoformat(self.store.now())

    @contextmanager
    def spared(self) -> Iterator[None]:
        """Let memory that runs out within be an error that only ends what is done there: it may
        have left a candidate's weights half in place."""
        try:
            with shortage_told():
                yield
        except KeditError as error:
            if error.code == SHORT:
                self.served.model.set_deltas(self.served.deltas)
            raise

    def _due(self, waiting: list[StoredFact]) -> str | None:
        if self.store.meta(HELD) is not None and not waiting:
            return None
        live = self.store.facts((State.LIVE_SIDE,))
        if not waiting and (not live or self._room() < 1):
            return None
        now = self._now()
        age = max(
            ((now - datetime.fromisoformat(f.changed_at)).total_seconds() for f in live),
            default=0.0,
        )
        rules = self.config.routing
        return flush_due(waiting, len(live), age, rules.flush_facts, rules.flush_age_seconds)

    def _flush(self, reason: str) -> None:
        """A flush that fails as a whole must not stop the daemon, nor come again at once."""
        short = list[StoredFact]()
        for part, error in self._in_parts(reason, False)[1]:
            if error.code == SHORT:
                short.extend(part)
            else:
                self.flush.give_up(part, str(error))
        if blamed := self.rest.blamed(short):
            self.flush.give_up(blamed, NO_ROOM)
        if left := [f for f in short if f not in blamed]:
            self._rest([f for f in left if f.state is State.RECEIVED], "weights")

    def _in_parts(
        self, reason: str, dry_run: bool
    ) -> tuple[list[dict[str, Any]], list[tuple[list[StoredFact], KeditError]]]:
        """Flush a batch: in one, or where there is no memory for that, one half after the other,
        and so on. What came of the parts that were done, and of those that could not be.

        Where the first fact alone finds no memory, the others wait for another time."""
        parts, done = deque([self.rest.in_turn(self._batch())]), list[dict[str, Any]]()
        failed = list[tuple[list[StoredFact], KeditError]]()
        while parts:
            self.flush.pulse()
            part = self._still_there(parts.popleft())
            if (done or failed) and not part:
                continue
            try:
                with self.spared():
                    done.append(self.flush.run(part, reason, dry_run))
                if done[-1]["flushed"]:
                    self.rest.found()
            except KeditError as error:
                if ends(error):
                    raise
                if error.code == SHORT and len(part) > 1:
                    log.warning("a flush of %d facts is done in halves: %s", len(part), error)
                    half = len(part) // 2
                    parts.extendleft((part[half:], part[:half]))
                    continue
                failed.append((part, error))
                if error.code == SHORT:
                    for fact in part:
                        self.rest.lacks(fact.id)
                    if not done:
                        break
        return done, failed

    def _still_there(self, facts: list[StoredFact]) -> list[StoredFact]:
        """Those that a flush may still take, as they are now: another part may have moved them."""
        now = [self.store.fact(fact.id) for fact in facts]
        return [f for f in now if f and f.state in (State.RECEIVED, State.LIVE_SIDE)]

    def _batch(self) -> list[StoredFact]:
        at = self.config.flush
        return self.flush.batch(at.batch_facts, at.memory_mb << 20)

    # What people and jobs ask for ---------------------------------------------------------------

    def run_flush(self, dry_run: bool) -> dict[str, Any]:
        """Flush now, whatever waits."""
        parts, failed = self._in_parts("asked for", dry_run)
        if not parts:
            raise failed[0][1]
        lists = ("flushed", "failed", "quarantined")
        told = {key: [n for part in parts for n in part.get(key, [])] for key in lists}
        told["failed"] += [fact.id for part, _ in failed for fact in part]
        merged = parts[-1] | {key: ids for key, ids in told.items() if key in parts[-1] or ids}
        reasons = [f"{len(part)} facts could not be flushed: {error}" for part, error in failed]
        return merged | {"reasons": [*merged["reasons"], *reasons]}

    def audit(self, dry_run: bool = False) -> dict[str, Any]:
        """Measure, judge, write it down, and do what the verdict says."""
        return self.auditor.audit(dry_run)

    def consolidate(self, dry_run: bool) -> dict[str, Any]:
        """Solve the weights again from W0."""
        return self.weights.consolidate(dry_run)

    def revert(self, names: list[str], generation: int | None, dry_run: bool) -> dict[str, Any]:
        """Take facts out by id, or go back to a generation."""
        if generation is not None:
            return self.weights.go_back(generation, dry_run)
        facts = [self._active(name) for name in names]
        return self.weights.take_out(facts, State.REVERTED, "reverted by hand", dry_run)

    def _active(self, name: str) -> StoredFact:
        fact = self.store.fact(name)
        if fact is None or fact.state not in ACTIVE:
            state = "unknown" if fact is None else f"{fact.state} already"
            raise KeditError(
                f"fact {name} is {state}", code="unknown-fact", hint="kedit-daemon facts"
            )
        return fact

    def expire(self) -> int:
        """End the facts whose time is over; how many."""
        now = self.store.now()
        over = [f for f in self.store.facts(ACTIVE) if (u := f.fact.valid_until) and u <= now]
        if over:
            self.weights.take_out(over, State.EXPIRED, "valid_until has passed")
        return len(over)

    def ask(self, prompt: str, max_tokens: int, base: bool, explain: bool) -> dict[str, Any]:
        """The edited model's answer, and on wish the base's, and the fact that fired."""
        began = time.monotonic()
        answer = self.served.ask([prompt], max_tokens)[0]
        self.auditor.traffic.count(answer.fired)
        result: dict[str, Any] = {
            "answer": answer.text,
            "generation": self.store.active_generation(),
            "seconds": time.monotonic() - began,
            "fired": self._fired(prompt, answer.fired) if explain else [],
        }
        if base:
            result["base_answer"] = self.served.ask_base([prompt], max_tokens)[0]
        return result

    def _fired(self, prompt: str, match: Match | None) -> list[dict[str, Any]]:
        """The side memory's fact that fired; else the facts in the weights that ask just this."""
        if match is not None:
            fact = self.store.fact(match.fact_id)
            return [_named(fact, match.score, match.margin)] if fact else []
        live = self.store.facts((State.LIVE_WEIGHTS,))
        asked = [f for f in live if prompt in (f.fact.question, *f.fact.rephrased)]
        return [_named(f, None, None) for f in asked]


def _named(fact: StoredFact, score: float | None, margin: float | None) -> dict[str, Any]:
    return {
        "fact": fact.id,
        "subject": fact.fact.subject,
        "prompt": fact.fact.prompt,
        "target": fact.fact.target,
        "tier": fact.tier,
        "score": score,
        "margin": margin,
    }
