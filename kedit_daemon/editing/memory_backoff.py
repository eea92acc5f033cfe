"""What is known of memory that edits did not find: who found none, and whether to try again yet."""

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta

from memory.db.rows import StoredFact

BACKOFF_TIME = timedelta(seconds=120)  # after there was no memory for a single fact


class MemoryBackoff:
    """No edit is tried for a while where there is no memory for one: somebody else may have it, and
    give it back. A fact is to blame only if others found memory since it first found none."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        self._clock = now
        self._started_at: datetime | None = None
        self._successes = 0  # edits that found memory
        self._shortages: dict[str, int] = {}  # facts without, and how many edits had found it then
        self.blocked_tier: str | None = None  # in which there was none when the last rest began

    def start_backoff(self, tier: str, there: Iterable[StoredFact]) -> None:
        """Rest from now on. `there`: the facts that may still be edited."""
        self._started_at, self.blocked_tier = self._clock(), tier
        ids = {fact.id for fact in there}
        self._shortages = {n: found for n, found in self._shortages.items() if n in ids}

    def is_active(self) -> bool:
        """Whether it is too early to try again; a clock that was set back makes it no longer."""
        return self._started_at is not None and abs(self._clock() - self._started_at) < BACKOFF_TIME

    def record_success(self) -> None:
        """An edit was made, so there was memory for it."""
        self._successes += 1

    def record_shortage(self, fact_id: str) -> None:
        """There was no memory for this fact alone."""
        self._shortages.setdefault(fact_id, self._successes)

    def pick_culprits(self, facts: Sequence[StoredFact]) -> list[StoredFact]:
        """Those of these facts without memory since when another found some; each once."""
        guilty = [f for f in facts if self._shortages.get(f.id, self._successes) < self._successes]
        for fact in facts:
            self._shortages.pop(fact.id, None)
        for fact in facts:  # anew at the end, behind those that have waited longer
            self._shortages[fact.id] = self._successes
        return guilty

    def order_by_shortage(self, facts: Sequence[StoredFact]) -> list[StoredFact]:
        """The same facts, last those that found no memory: they must not stop the others."""
        turn = {fact_id: n for n, fact_id in enumerate(self._shortages, 1)}
        return sorted(facts, key=lambda fact: turn.get(fact.id, 0))
