"""The edit loop's hands: what to do next with waiting facts, and what people and jobs ask for."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

from kedit_daemon.config import Config
from kedit_daemon.editing.audit import Auditor, make_thresholds
from kedit_daemon.editing.flush import Flush
from kedit_daemon.editing.generations import Generations
from kedit_daemon.editing.live_model import LiveModel
from kedit_daemon.editing.memory_backoff import BACKOFF_TIME, MemoryBackoff
from kedit_daemon.editing.side_learner import OUTSIDE_LINES, SideLearner, describe_failure
from memory.db import meta_keys
from memory.db.rows import StoredFact
from memory.errors import KeditError, OutOfMemory, Rejected, ends_daemon
from memory.facts import ACTIVE_STATES, FactState
from memory.oom import as_out_of_memory
from memory.side.side_memory import RoutingMatch
from policies.cooldown import Cooldown
from policies.routing import find_flush_reason, is_for_batch

NO_MEMORY = "there was no memory left for this fact alone"
log = logging.getLogger(__name__)


class Editor:
    """Everything that changes what the model says. One thread uses it."""

    def __init__(
        self,
        served: LiveModel,
        config: Config,
        pulse: Callable[[], None],
        outside_lines: int = OUTSIDE_LINES,
    ) -> None:
        self.live_model, self.store, self.config = served, served.store, config
        self.generations = Generations(served, make_thresholds(config, served.site))
        self.flush = Flush(self.generations, config.inbox.max_attempts, pulse)
        at = config.stability
        restraint = Cooldown(at.cool_down_seconds, at.acts_a_day)
        self.auditor = Auditor(self.flush, restraint)
        self.side_learner = SideLearner(
            self.flush, config.side.batch_facts, config.side.steps, pulse, outside_lines
        )
        self.memory_backoff = MemoryBackoff(self._read_clock)

    def finish_interrupted(self) -> None:
        """At the start: do what a crash came before, between two transactions of one change."""
        try:
            self.generations.recheck_side()
        except KeditError as error:
            if ends_daemon(error):
                raise
            # No reason to stay away: what is served is as it was.
            log.warning("a change that was cut short cannot be completed: %s", error)

    # The loop -----------------------------------------------------------------------------------

    def step(self) -> bool:
        """Do one piece of work that waits, if there is any."""
        if self.memory_backoff.is_active():
            return False
        waiting = self.memory_backoff.order_by_shortage(
            self._keep_newest(self.store.list_facts((FactState.RECEIVED,)))
        )
        tiers = [self._step_side, self._step_batch]
        if (
            self.memory_backoff.blocked_tier == "side"
        ):  # what finds no memory in one must not stop the other
            tiers.reverse()
        return any(work(waiting) for work in tiers)

    def _step_side(self, waiting: list[StoredFact]) -> bool:
        for_side = [f for f in waiting if not is_for_batch(f)]
        if for_side:
            self._learn_waiting(for_side)
        return bool(for_side)

    def _step_batch(self, waiting: list[StoredFact]) -> bool:
        for_batch = [f for f in waiting if is_for_batch(f)]
        if no_room := self._find_over_capacity(for_batch):
            with self.store.db.transaction():
                self.flush.send_to_side(no_room)
            return True
        if reason := self._find_flush_reason(for_batch):
            self._flush_waiting(reason)
            return True
        return False

    def _find_over_capacity(self, for_batch: list[StoredFact]) -> list[StoredFact]:
        """The facts that no batch would take: the weights are full, and they replace nothing."""
        if not for_batch or self._compute_headroom() >= 1:
            return []
        return [f for f in for_batch if not self.flush.is_replacement(f)]

    def _compute_headroom(self) -> float:
        return self.flush.compute_headroom(self.generations.capacity_log.read_capacity())

    def _keep_newest(self, waiting: list[StoredFact]) -> list[StoredFact]:
        """One fact a slot: one that was sent back to wait may have been superseded meanwhile."""
        newest = {f.fact.slot: f for f in waiting}
        outdated = [f for f in waiting if newest[f.fact.slot] is not f]
        if outdated:
            with self.store.db.transaction():
                for fact in outdated:
                    by = newest[fact.fact.slot].id
                    self.store.change_state(
                        fact.id, FactState.SUPERSEDED, reason=f"superseded by {by}"
                    )
        return list(newest.values())

    def _learn_waiting(self, waiting: list[StoredFact]) -> None:
        """What cannot be learned together is tried fact by fact: one must not stop the rest.
        Where there is no memory for so many at once, it is half of them."""
        most = min(self.side_learner.batch_facts, len(waiting))
        while most > 1:
            error = self._try_learning(waiting, most)
            if error is None or self._has_moved_facts(waiting, error):
                return
            if not isinstance(error, OutOfMemory):
                waiting = waiting[:1]
            most = min(most // 2, len(waiting))
        self._learn_singly(waiting[:2])

    def _learn_singly(self, facts: list[StoredFact]) -> None:
        """Try the first fact, and where there is no memory for it, the next; else rest."""
        short = list[StoredFact]()
        for fact in facts:
            error = self._try_learning([fact], 1)
            if error is None or self._has_moved_facts([fact], error):
                break
            why = describe_failure(error)
            log.warning("%s cannot be learned: %s", fact.id, why, exc_info=error)
            if not isinstance(error, OutOfMemory):
                with self.store.db.transaction():
                    if isinstance(error, Rejected):
                        self.store.change_state(fact.id, FactState.REJECTED, reason=why)
                    else:
                        self.flush.record_failed_attempt(fact, "side", why)
                break
            self.memory_backoff.record_shortage(fact.id)
            short.append(fact)
        blamed = self.memory_backoff.pick_culprits(short)
        with self.store.db.transaction():
            for fact in blamed:
                self.flush.record_failed_attempt(fact, "side", NO_MEMORY)
        if len(short) == len(facts):
            self._start_backoff([f for f in short if f not in blamed], "side")

    def _try_learning(self, waiting: list[StoredFact], most: int) -> Exception | None:
        """Learn at most so many; why it cannot be done."""
        try:
            with self.guard_memory():
                if self.side_learner.learn_batch(waiting, most):
                    self.memory_backoff.record_success()
        except (KeditError, ArithmeticError, RuntimeError, ValueError) as error:
            if ends_daemon(error):
                raise
            return error
        return None

    def _has_moved_facts(self, waiting: list[StoredFact], error: Exception) -> bool:
        """Whether an error came after facts had been moved: none of them is to blame, and the next
        step sees what is left."""
        left = [f for f in self._reload_waiting(waiting) if f.state is FactState.RECEIVED]
        moved = len(left) < len(waiting)
        if moved:
            log.warning("facts were moved, and then: %s", error, exc_info=error)
        return moved

    def _start_backoff(self, facts: list[StoredFact], tier: str) -> None:
        """Try nothing for a while. It is no attempt at these facts, for which there was no memory
        alone; what came for a batch may find enough of it in the side memory."""
        log.warning("no edit for %g s: %s", BACKOFF_TIME.total_seconds(), NO_MEMORY)
        self.memory_backoff.start_backoff(
            tier, self.store.list_facts((FactState.RECEIVED, FactState.LIVE_SIDE))
        )
        with self.store.db.transaction():
            for fact in facts:
                self.store.db.write_event("edit_failed", fact.id, tier=tier, reason=NO_MEMORY)
            if tier == "weights":
                self.generations.redirect_to_side(facts)

    def _read_clock(self) -> datetime:
        return datetime.fromisoformat(self.store.db.format_now())

    @contextmanager
    def guard_memory(self) -> Iterator[None]:
        """Let memory that runs out within be an error that only ends what is done there: it may
        have left a candidate's weights half in place."""
        try:
            with as_out_of_memory():
                yield
        except OutOfMemory:
            self.live_model.model.set_deltas(self.live_model.active_deltas)
            raise

    def _find_flush_reason(self, waiting: list[StoredFact]) -> str | None:
        if self.store.db.get_meta(meta_keys.FLUSH_HELD) is not None and not waiting:
            return None
        live = self.store.list_facts((FactState.LIVE_SIDE,))
        if not waiting and (not live or self._compute_headroom() < 1):
            return None
        now = self._read_clock()
        age = max(
            ((now - datetime.fromisoformat(f.changed_at)).total_seconds() for f in live),
            default=0.0,
        )
        rules = self.config.routing
        return find_flush_reason(
            waiting, len(live), age, rules.flush_facts, rules.flush_age_seconds
        )

    def _flush_waiting(self, reason: str) -> None:
        """A flush that fails as a whole must not stop the daemon, nor come again at once."""
        short = list[StoredFact]()
        for part, error in self._flush_in_parts(reason, False)[1]:
            if isinstance(error, OutOfMemory):
                short.extend(part)
            else:
                self.flush.record_failed_flush(part, str(error))
        if blamed := self.memory_backoff.pick_culprits(short):
            self.flush.record_failed_flush(blamed, NO_MEMORY)
        if left := [f for f in short if f not in blamed]:
            self._start_backoff([f for f in left if f.state is FactState.RECEIVED], "weights")

    def _flush_in_parts(
        self, reason: str, dry_run: bool
    ) -> tuple[list[dict[str, Any]], list[tuple[list[StoredFact], KeditError]]]:
        """Flush a batch: in one, or where there is no memory for that, one half after the other,
        and so on. What came of the parts that were done, and of those that could not be.

        Where the first fact alone finds no memory, the others wait for another time."""
        parts, done = (
            deque([self.memory_backoff.order_by_shortage(self._select_batch())]),
            list[dict[str, Any]](),
        )
        failed = list[tuple[list[StoredFact], KeditError]]()
        while parts:
            self.flush.pulse()
            part = self._reload_waiting(parts.popleft())
            if (done or failed) and not part:
                continue
            try:
                with self.guard_memory():
                    done.append(self.flush.flush_batch(part, reason, dry_run))
                if done[-1]["flushed"]:
                    self.memory_backoff.record_success()
            except KeditError as error:
                if ends_daemon(error):
                    raise
                if isinstance(error, OutOfMemory) and len(part) > 1:
                    log.warning("a flush of %d facts is done in halves: %s", len(part), error)
                    half = len(part) // 2
                    parts.extendleft((part[half:], part[:half]))
                    continue
                failed.append((part, error))
                if isinstance(error, OutOfMemory):
                    for fact in part:
                        self.memory_backoff.record_shortage(fact.id)
                    if not done:
                        break
        return done, failed

    def _reload_waiting(self, facts: list[StoredFact]) -> list[StoredFact]:
        """Those that a flush may still take, as they are now: another part may have moved them."""
        now = [self.store.find_fact(fact.id) for fact in facts]
        return [f for f in now if f and f.state in (FactState.RECEIVED, FactState.LIVE_SIDE)]

    def _select_batch(self) -> list[StoredFact]:
        at = self.config.flush
        return self.flush.select_batch(at.batch_facts, at.memory_mb << 20)

    # What people and jobs ask for ---------------------------------------------------------------

    def run_flush(self, dry_run: bool) -> dict[str, Any]:
        """Flush now, whatever waits."""
        parts, failed = self._flush_in_parts("asked for", dry_run)
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
        return self.generations.consolidate(dry_run)

    def revert(self, names: list[str], generation: int | None, dry_run: bool) -> dict[str, Any]:
        """Take facts out by id, or go back to a generation."""
        if generation is not None:
            return self.generations.restore_generation(generation, dry_run)
        facts = [self._require_active(name) for name in names]
        return self.generations.remove_facts(facts, FactState.REVERTED, "reverted by hand", dry_run)

    def _require_active(self, name: str) -> StoredFact:
        fact = self.store.find_fact(name)
        if fact is None or fact.state not in ACTIVE_STATES:
            state = "unknown" if fact is None else f"{fact.state} already"
            raise KeditError(
                f"fact {name} is {state}", code="unknown-fact", hint="kedit-daemon facts"
            )
        return fact

    def expire_facts(self) -> int:
        """End the facts whose time is over; how many."""
        now = self.store.db.format_now()
        over = [
            f
            for f in self.store.list_facts(ACTIVE_STATES)
            if (u := f.fact.valid_until) and u <= now
        ]
        if over:
            self.generations.remove_facts(over, FactState.EXPIRED, "valid_until has passed")
        return len(over)

    def answer_prompt(
        self, prompt: str, max_tokens: int, base: bool, explain: bool
    ) -> dict[str, Any]:
        """The edited model's answer, and on wish the base's, and the fact that fired."""
        began = time.monotonic()
        answer = self.live_model.answer_prompts([prompt], max_tokens)[0]
        self.auditor.traffic.count_question(answer.fired_match)
        result: dict[str, Any] = {
            "answer": answer.text,
            "generation": self.store.artifacts.active_generation(),
            "seconds": time.monotonic() - began,
            "fired": self._find_fired(prompt, answer.fired_match) if explain else [],
        }
        if base:
            result["base_answer"] = self.live_model.answer_base([prompt], max_tokens)[0]
        return result

    def _find_fired(self, prompt: str, match: RoutingMatch | None) -> list[dict[str, Any]]:
        """The side memory's fact that fired; else the facts in the weights that ask just this."""
        if match is not None:
            fact = self.store.find_fact(match.fact_id)
            return [_describe_fact(fact, match.score, match.margin)] if fact else []
        live = self.store.list_facts((FactState.LIVE_WEIGHTS,))
        asked = [f for f in live if prompt in (f.fact.question, *f.fact.filled_paraphrases)]
        return [_describe_fact(f, None, None) for f in asked]


def _describe_fact(fact: StoredFact, score: float | None, margin: float | None) -> dict[str, Any]:
    return {
        "fact": fact.id,
        "subject": fact.fact.subject,
        "prompt": fact.fact.prompt,
        "target": fact.fact.target,
        "tier": fact.tier,
        "score": score,
        "margin": margin,
    }
