"""Room in the weights: what they bear by all that was measured, kept where people can see it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from memory.db import meta_keys
from memory.db.event_log import to_canonical_json
from memory.db.rows import StoredFact
from memory.db.store import Store
from memory.model.canary import Health
from policies.capacity import Capacity, Observation, estimate_capacity, make_observation
from policies.probe import Probe
from policies.stability import Thresholds, Verdict

MAX_TRIALS = 8
FULL_SHARE = 0.95  # of the capacity


@dataclass(frozen=True)
class Trial:
    """What came of solving the weights with a batch."""

    facts: int  # in the weights then
    held_facts: list[StoredFact]
    lost_facts: list[StoredFact]  # those that did not hold
    probes: dict[str, Probe]
    health: Health
    verdict: Verdict

    def merge_larger(self, larger: "Trial") -> "Trial":
        """With what did not hold in the larger trial before it, which this one has not tried."""
        probes = larger.probes | self.probes
        return replace(self, lost_facts=[*larger.lost_facts, *self.lost_facts], probes=probes)


class CapacityLog:
    """Learns from the generations, and from solves that were too large to become one."""

    def __init__(self, store: Store, thresholds: Thresholds) -> None:
        self.store, self.thresholds = store, thresholds
        with store.db.transaction():
            self.record_capacity()

    def estimate_capacity(self, more: Sequence[Observation] = ()) -> Capacity | None:
        """How many facts the weights bear, with observations that are not written down yet."""
        rows = [*self.store.artifacts.list_measurements(), *self._load_trials()]
        return estimate_capacity(
            [*(make_observation(n, figures) for n, figures in rows), *more], self.thresholds
        )

    def read_capacity(self) -> int | None:
        """The count of `capacity`, as it was written down last."""
        count = self.store.db.get_meta(meta_keys.WEIGHTS_CAPACITY)
        return None if count is None else int(count)

    def record_capacity(self) -> None:
        """Write down what the weights bear. Inside a transaction."""
        found = self.estimate_capacity()
        facts, figure = (None, None) if found is None else (str(found.facts), found.figure)
        self.store.db.set_meta(meta_keys.WEIGHTS_CAPACITY, facts)
        self.store.db.set_meta(meta_keys.WEIGHTS_LIMIT, figure)

    def record_oversized(self, facts: int, health: Health) -> None:
        """Keep the figures of a solve that was not published. Inside a transaction."""
        trials = [*self._load_trials(), (facts, health.as_dict())][-MAX_TRIALS:]
        self.store.db.set_meta(meta_keys.WEIGHTS_TRIALS, to_canonical_json(trials))
        self.record_capacity()

    def forget_trials(self) -> None:
        """What was tried beside facts that have left says nothing any more. In a transaction."""
        self.store.db.set_meta(meta_keys.WEIGHTS_TRIALS, None)

    def _load_trials(self) -> list[tuple[int, dict[str, object]]]:
        return [
            (int(n), figures)
            for n, figures in json.loads(self.store.db.get_meta(meta_keys.WEIGHTS_TRIALS) or "[]")
        ]
