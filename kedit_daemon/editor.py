"""The edit loop's hands: what to do next with waiting facts, and what people and jobs ask for."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from kedit_daemon.auditor import Auditor, thresholds
from kedit_daemon.config import Config
from kedit_daemon.flush import Flush
from kedit_daemon.hot import Hot, cannot_learn
from kedit_daemon.serving import Served
from kedit_daemon.weights import HELD, Weights
from memory.errors import KeditError, ends
from memory.facts import ACTIVE, State
from memory.rows import StoredFact
from memory.shortage import SHORT, shortage_told
from memory.side import Match
from policies.routing import flush_due, wants_batch
from policies.steadiness import Restraint

REST = timedelta(seconds=120)  # after there was no memory for a single fact
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
        self._rested: datetime | None = None  # since when, where there was no memory for one fact

    # The loop -----------------------------------------------------------------------------------

    def step(self) -> bool:
        """Do one piece of work that waits, if there is any."""
        if self._resting():
            return False
        waiting = self._newest(self.store.facts((State.RECEIVED,)))
        for_side = [f for f in waiting if not wants_batch(f)]
        if for_side:
            self._learn(for_side)
            return True
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

    def _learn(self, waiting: list[StoredFact], most: int | None = None) -> None:
        """What cannot be learned together is tried fact by fact: one must not stop the rest.
        Where there is no memory for `most` at once, it is half of them."""
        most = min(most or self.hot.batch_facts, len(waiting))
        try:
            with self.spared():
                self.hot.take(waiting, most)
        except (KeditError, ArithmeticError, RuntimeError, ValueError) as error:
            if ends(error):
                raise
            if most > 1 and isinstance(error, KeditError) and error.code == SHORT:
                self._learn(waiting, most // 2)
                return
            if len(waiting) > 1:
                self._learn(waiting[:1])
                return
            why = cannot_learn(error)
            log.warning("%s cannot be learned: %s", waiting[0].id, why, exc_info=error)
            if why.code == SHORT:
                self._rest(waiting, "side", str(why))
                return
            with self.store.transaction():
                if why.code == "rejected":
                    self.store.move(waiting[0].id, State.REJECTED, reason=str(why))
                else:
                    self.flush.retry(waiting[0], "side", str(why))

    def _rest(self, facts: list[StoredFact], tier: str, why: str) -> None:
        """Try nothing for a while: somebody else may have the memory, and give it back."""
        log.warning("no edit for %g s: %s", REST.total_seconds(), why)
        self._rested = self._now()
        with self.store.transaction():
            for fact in facts:
                self.flush.retry(fact, tier, why)

    def _resting(self) -> bool:
        # A clock that was set back must not make it longer.
        return self._rested is not None and abs(self._now() - self._rested) < REST

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

        short: list[StoredFact] = []

        def give_up(part: list[StoredFact], error: KeditError) -> None:
            if ends(error):
                raise error
            if error.code == SHORT:
                short.extend(part)
            else:
                self.flush.give_up(part, str(error))

        if self._in_parts(reason, False, give_up) and short:
            self.flush.give_up(short, NO_ROOM)  # the others found memory
        elif short:
            self._rest([f for f in short if f.state is State.RECEIVED], "weights", NO_ROOM)

    def _in_parts(
        self, reason: str, dry_run: bool, failed: Callable[[list[StoredFact], KeditError], None]
    ) -> list[dict[str, Any]]:
        """Flush a batch: in one, or where there is no memory for that, one half after the other,
        and so on. `failed` is told of a part with which it cannot be done at all."""
        parts, done = deque([self._batch()]), list[dict[str, Any]]()
        while parts:
            part = self._still_there(parts.popleft())
            if done and not part:
                continue
            try:
                with self.spared():
                    done.append(self.flush.run(part, reason, dry_run))
            except KeditError as error:
                if error.code != SHORT or len(part) < 2:
                    failed(part, error)
                    continue
                log.warning("a flush of %d facts is done in halves: %s", len(part), error)
                half = len(part) // 2
                parts.extendleft((part[half:], part[:half]))
        return done

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

        def refuse(_: list[StoredFact], error: KeditError) -> None:
            raise error

        parts = self._in_parts("asked for", dry_run, refuse)
        lists = ("flushed", "failed", "quarantined")
        told = {key: [n for part in parts for n in part.get(key, [])] for key in lists}
        return parts[-1] | {key: ids for key, ids in told.items() if key in parts[-1] or ids}

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
