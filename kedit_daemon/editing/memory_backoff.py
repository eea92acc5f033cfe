"""What is known of memory that edits did not find: who found none, and whether to try again yet."""

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timedelta

from memory.db.rows import StoredFact

REST = timedelta(seconds=120)  # after there was no memory for a single fact


class Rest:
    """No edit is tried for a while where there is no memory for one: somebody else may have it, and
    give it back. A fact is to blame only if others found memory since it first found none."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        self._now = now
        self._since: datetime | None = None
        self._found = 0  # edits that found memory
        self._lacking: dict[str, int] = {}  # facts without, and how many edits had found it then
        self.tier: str | None = None  # in which there was none when the last rest began

    def begin(self, tier: str, there: Iterable[StoredFact]) -> None:
        """Rest from now on. `there`: the facts that may still be edited."""
        self._since, self.tier = self._now(), tier
        ids = {fact.id for fact in there}
        self._lacking = {n: found for n, found in self._lacking.items() if n in ids}

    def goes_on(self) -> bool:
        """Whether it is too early to try again; a clock that was set back makes it no longer."""
        return self._since is not None and abs(self._now() - self._since) < REST

    def found(self) -> None:
        """An edit was made, so there was memory for it."""
        self._found += 1

    def lacks(self, fact_id: str) -> None:
        """There was no memory for this fact alone."""
        self._lacking.setdefault(fact_id, self._found)

    def blamed(self, facts: Sequence[StoredFact]) -> list[StoredFact]:
        """Those of these facts without memory since when another found some; each once."""
        guilty = [f for f in facts if self._lacking.get(f.id, self._found) < self._found]
        for fact in facts:
            self._lacking.pop(fact.id, None)
        for fact in facts:  # anew at the end, behind those that have waited longer
            self._lacking[fact.id] = self._found
        return guilty

    def in_turn(self, facts: Sequence[StoredFact]) -> list[StoredFact]:
        """The same facts, last those that found no memory: they must not stop the others."""
        turn = {fact_id: n for n, fact_id in enumerate(self._lacking, 1)}
        return sorted(facts, key=lambda fact: turn.get(fact.id, 0))
