"""Edits within the memory there is: a batch is halved until it fits, down to one fact, and where
there is none even for that, edits back off for a while.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from kedit_daemon.editing.amendments import Amendments
from kedit_daemon.editing.fact_lifecycle import Lifecycle
from kedit_daemon.editing.flush import Flush
from kedit_daemon.editing.live_model import LiveModel
from kedit_daemon.editing.side_learner import SideLearner
from memory.db.rows import StoredFact
from memory.db.store import Store
from memory.errors import KeditError, OutOfMemory, Rejected, ends_daemon
from memory.facts import FactState
from memory.oom import as_out_of_memory

BACKOFF_TIME = timedelta(seconds=120)
NO_MEMORY = "there was no memory left for this fact alone"
log = logging.getLogger(__name__)

FailedPart = tuple[list[StoredFact], KeditError]


class MemoryBackoff:
    """Delays edits when there is no memory for a single fact: another process may have it, and
    give it back. A fact is a culprit only if others found memory since it first found none."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        self._clock = now
        self._started_at: datetime | None = None
        self._successes = 0  # edits that found memory
        self._shortages: dict[str, int] = {}  # successes by then, of each fact that found none
        self.blocked_tier: str | None = None  # the one that found none when this last began

    def start_backoff(self, tier: str, facts: Iterable[StoredFact]) -> None:
        """Back off from now on. `facts`: all that may still be edited; others are forgotten."""
        self._started_at, self.blocked_tier = self._clock(), tier
        ids = {fact.id for fact in facts}
        self._shortages = {n: count for n, count in self._shortages.items() if n in ids}

    def is_active(self) -> bool:
        """Check that it is too early to try again; a clock set back does not prolong the wait."""
        return self._started_at is not None and abs(self._clock() - self._started_at) < BACKOFF_TIME

    def record_success(self) -> None:
        """Record an edit, for which there was memory."""
        self._successes += 1

    def record_shortage(self, fact_id: str) -> None:
        """Record that there was no memory for this fact alone."""
        self._shortages.setdefault(fact_id, self._successes)

    def pick_culprits(self, facts: Sequence[StoredFact]) -> list[StoredFact]:
        """Pick the facts that found no memory since others found some; each once."""
        known, now = self._shortages, self._successes
        culprits = [f for f in facts if known.get(f.id, now) < now]
        for fact in facts:
            self._shortages.pop(fact.id, None)
        for fact in facts:  # again at the end, behind those that have waited longer
            self._shortages[fact.id] = self._successes
        return culprits

    def order_by_shortage(self, facts: Sequence[StoredFact]) -> list[StoredFact]:
        """Sort the facts that found no memory last: they must not stop the others."""
        turn = {fact_id: n for n, fact_id in enumerate(self._shortages, 1)}
        return sorted(facts, key=lambda fact: turn.get(fact.id, 0))


@contextmanager
def guard_memory(live_model: LiveModel) -> Iterator[None]:
    """Raise OutOfMemory when memory runs out in the block, with the active generation back in the
    model: a candidate's weights may have been left half in place."""
    try:
        with as_out_of_memory():
            yield
    except OutOfMemory:
        live_model.model.set_deltas(live_model.active_deltas)
        raise


class EditRunner:
    """Learns and flushes batches, in halves when memory runs out."""

    def __init__(
        self,
        live_model: LiveModel,
        store: Store,
        lifecycle: Lifecycle,
        flush: Flush,
        side_learner: SideLearner,
        backoff: MemoryBackoff,
    ) -> None:
        self.live_model, self.store, self.lifecycle = live_model, store, lifecycle
        self.flush, self.side_learner, self.backoff = flush, side_learner, backoff

    def carry_out_amendments(self, amendments: Amendments) -> bool:
        """Carry out amendments; back off while there is no memory for it. Return False if there
        are none."""
        try:
            with guard_memory(self.live_model):
                return amendments.carry_out()
        except OutOfMemory:
            self._start_backoff([], "weights")
            return True

    # Side memory --------------------------------------------------------------------------------

    def learn_waiting(self, waiting: list[StoredFact]) -> None:
        """Learn the first waiting facts: half as many while memory runs out, and one by one after
        any other error, since one fact must not stop the rest."""
        count = min(self.side_learner.batch_facts, len(waiting))
        while count > 1:
            error = self._try_learning(waiting, count)
            if error is None or self._has_moved_facts(waiting, error):
                return
            if not isinstance(error, OutOfMemory):
                waiting = waiting[:1]
            count = min(count // 2, len(waiting))
        self._learn_singly(waiting[:2])

    def _learn_singly(self, facts: list[StoredFact]) -> None:
        """Learn the first fact, or the next if there is no memory for it; else back off."""
        short = list[StoredFact]()
        for fact in facts:
            error = self._try_learning([fact], 1)
            if error is None or self._has_moved_facts([fact], error):
                break
            reason = describe_failure(error)
            log.warning("Cannot learn fact %s: %s", fact.id, reason, exc_info=error)
            if not isinstance(error, OutOfMemory):
                self._record_failure(fact, error, reason)
                break
            self.backoff.record_shortage(fact.id)
            short.append(fact)
        culprits = self.backoff.pick_culprits(short)
        with self.store.db.transaction():
            for fact in culprits:
                self.side_learner.record_failure(fact, NO_MEMORY)
        if len(short) == len(facts):
            self._start_backoff([f for f in short if f not in culprits], "side")

    def _try_learning(self, waiting: list[StoredFact], max_facts: int) -> Exception | None:
        """Learn at most `max_facts`. Return the error, if there was one."""
        try:
            with guard_memory(self.live_model):
                if self.side_learner.learn_batch(waiting, max_facts):
                    self.backoff.record_success()
        except (KeditError, ArithmeticError, RuntimeError, ValueError) as error:
            if ends_daemon(error):
                raise
            return error
        return None

    def _has_moved_facts(self, waiting: list[StoredFact], error: Exception) -> bool:
        """Check that an error came after facts had been moved. None of them is to blame then, and
        the next step sees what is left."""
        found = [self.store.find_fact(fact.id) for fact in waiting]
        pairs = zip(waiting, found, strict=True)
        moved = any(now is None or now.state is not before.state for before, now in pairs)
        if moved:
            log.warning("Error after facts were moved: %s", error, exc_info=error)
        return moved

    def _record_failure(self, fact: StoredFact, error: Exception, reason: str) -> None:
        with self.store.db.transaction():
            if isinstance(error, Rejected) and fact.state is FactState.RECEIVED:
                self.store.change_state(fact.id, FactState.REJECTED, reason=reason)
            else:
                self.side_learner.record_failure(fact, reason)

    # Weights ------------------------------------------------------------------------------------

    def flush_waiting(self, batch: list[StoredFact], reason: str) -> None:
        """Flush a batch. A flush that fails as a whole must not stop the daemon, nor start again
        at once."""
        short = list[StoredFact]()
        for part, error in self.flush_in_parts(batch, reason, dry_run=False)[1]:
            if isinstance(error, OutOfMemory):
                short.extend(part)
            else:
                self.flush.record_failed_flush(part, str(error))
        if culprits := self.backoff.pick_culprits(short):
            self.flush.record_failed_flush(culprits, NO_MEMORY)
        if left := [f for f in short if f not in culprits]:
            self._start_backoff([f for f in left if f.state is FactState.RECEIVED], "weights")

    def flush_in_parts(
        self, batch: list[StoredFact], reason: str, dry_run: bool
    ) -> tuple[list[dict[str, Any]], list[FailedPart]]:
        """Flush a batch, or where there is no memory for that one half after the other, and so on.
        Return the reports of the parts that were flushed, and the parts that failed.

        When there is no memory even for the first fact alone, the others are left for later.
        """
        parts = deque([self.backoff.order_by_shortage(batch)])
        done, failed = list[dict[str, Any]](), list[FailedPart]()
        while parts:
            self.flush.pulse()
            part = self._reload(parts.popleft())
            if (done or failed) and not part:
                continue
            try:
                with guard_memory(self.live_model):
                    done.append(self.flush.flush_batch(part, reason, dry_run))
                if done[-1]["flushed"]:
                    self.backoff.record_success()
            except KeditError as error:
                if ends_daemon(error):
                    raise
                if isinstance(error, OutOfMemory) and len(part) > 1:
                    log.warning("Out of memory, splitting the flush of %d: %s", len(part), error)
                    half = len(part) // 2
                    parts.extendleft((part[half:], part[:half]))
                    continue
                failed.append((part, error))
                if isinstance(error, OutOfMemory):
                    for fact in part:
                        self.backoff.record_shortage(fact.id)
                    if not done:
                        break
        return done, failed

    def _reload(self, facts: list[StoredFact]) -> list[StoredFact]:
        """Read facts again, without those that are ended or in the weights: another part may have
        moved them."""
        current = [self.store.find_fact(fact.id) for fact in facts]
        return [f for f in current if f and f.state in (FactState.RECEIVED, FactState.LIVE_SIDE)]

    def _start_backoff(self, facts: list[StoredFact], tier: str) -> None:
        """Back off. For these facts it counts as no attempt; there may be memory enough in the
        side memory for those that waited for a batch."""
        log.warning("No edit for %g s: %s", BACKOFF_TIME.total_seconds(), NO_MEMORY)
        editable = self.store.list_facts((FactState.RECEIVED, FactState.LIVE_SIDE))
        self.backoff.start_backoff(tier, editable)
        with self.store.db.transaction():
            for fact in facts:
                self.store.db.write_event("edit_failed", fact.id, tier=tier, reason=NO_MEMORY)
            if tier == "weights":
                self.lifecycle.redirect_to_side(facts)


def describe_failure(error: Exception) -> str:
    """Return the reason to record for a fact that could not be learned."""
    if isinstance(error, KeditError):
        return str(error)
    return f"unexpected: {type(error).__name__}: {error}"
