"""Room in the weights: what they bear by all that was measured, kept where people can see it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from memory.db.event_log import canonical
from memory.db.rows import StoredFact
from memory.db.store import Store
from memory.model.canary import Health
from policies.capacity import Capacity, Observation, capacity, observed
from policies.probe import Probe
from policies.stability import Thresholds, Verdict

# In the store's meta. The first two are read by `status`, which imports nothing heavy.
CAPACITY, LIMIT = "weights_capacity", "weights_limit"
TRIALS = "weights_trials"  # solves that were not published: [facts, figures] each, newest last
TRIALS_KEPT = 8
FULL = 0.95  # of the capacity


@dataclass(frozen=True)
class Trial:
    """What came of solving the weights with a batch."""

    facts: int  # in the weights then
    taken: list[StoredFact]
    lost: list[StoredFact]  # those that did not hold
    probes: dict[str, Probe]
    health: Health
    verdict: Verdict

    def after(self, larger: "Trial") -> "Trial":
        """With what did not hold in the larger trial before it, which this one has not tried."""
        probes = larger.probes | self.probes
        return replace(self, lost=[*larger.lost, *self.lost], probes=probes)


class Room:
    """Learns from the generations, and from solves that were too large to become one."""

    def __init__(self, store: Store, thresholds: Thresholds) -> None:
        self.store, self.thresholds = store, thresholds
        with store.transaction():
            self.remember()

    def capacity(self, more: Sequence[Observation] = ()) -> Capacity | None:
        """How many facts the weights bear, with observations that are not written down yet."""
        rows = [*self.store.measured_generations(), *self._trials()]
        return capacity([*(observed(n, figures) for n, figures in rows), *more], self.thresholds)

    def known(self) -> int | None:
        """The count of `capacity`, as it was written down last."""
        count = self.store.meta(CAPACITY)
        return None if count is None else int(count)

    def remember(self) -> None:
        """Write down what the weights bear. Inside a transaction."""
        found = self.capacity()
        self.store.set_meta(CAPACITY, None if found is None else str(found.facts))
        self.store.set_meta(LIMIT, None if found is None else found.figure)

    def too_many(self, facts: int, health: Health) -> None:
        """Keep the figures of a solve that was not published. Inside a transaction."""
        trials = [*self._trials(), (facts, health.as_dict())][-TRIALS_KEPT:]
        self.store.set_meta(TRIALS, canonical(trials))
        self.remember()

    def forget_trials(self) -> None:
        """What was tried beside facts that have left says nothing any more. In a transaction."""
        self.store.set_meta(TRIALS, None)

    def _trials(self) -> list[tuple[int, dict[str, object]]]:
        return [(int(n), figures) for n, figures in json.loads(self.store.meta(TRIALS) or "[]")]
