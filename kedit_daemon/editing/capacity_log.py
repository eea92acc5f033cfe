"""The capacity of the weights in facts, estimated from measurements and kept in the store."""

import json
from collections.abc import Sequence

from memory.canonical_json import to_canonical_json
from memory.db import meta_keys
from memory.db.store import Store
from memory.model.canary import Health
from policies.capacity import Capacity, Observation, estimate_capacity, make_observation
from policies.health_limits import Thresholds

MAX_TRIALS = 8
FULL_SHARE = 0.95  # of the capacity


class CapacityLog:
    """Estimates the capacity from generations, and from solves that were too large for one."""

    def __init__(self, store: Store, thresholds: Thresholds) -> None:
        self.store, self.thresholds = store, thresholds
        with store.db.transaction():
            self.record_capacity()

    def estimate_capacity(self, more: Sequence[Observation] = ()) -> Capacity | None:
        """Estimate how many facts the weights hold, with `more` observations than are stored."""
        rows = [*self.store.artifacts.list_measurements(), *self._load_trials()]
        stored = [make_observation(n, figures) for n, figures in rows]
        return estimate_capacity([*stored, *more], self.thresholds)

    def read_capacity(self) -> int | None:
        """Read the facts of the capacity that was recorded last."""
        count = self.store.db.get_meta(meta_keys.WEIGHTS_CAPACITY)
        return None if count is None else int(count)

    def record_capacity(self) -> None:
        """Record the capacity. Runs inside a transaction."""
        found = self.estimate_capacity()
        facts, figure = (None, None) if found is None else (str(found.facts), found.figure)
        self.store.db.set_meta(meta_keys.WEIGHTS_CAPACITY, facts)
        self.store.db.set_meta(meta_keys.WEIGHTS_LIMIT, figure)

    def record_oversized(self, facts: int, health: Health) -> None:
        """Record the figures of a solve that was not activated. Runs inside a transaction."""
        trials = [*self._load_trials(), (facts, health.as_dict())][-MAX_TRIALS:]
        self.store.db.set_meta(meta_keys.WEIGHTS_TRIALS, to_canonical_json(trials))
        self.record_capacity()

    def forget_trials(self) -> None:
        """Forget solves that were tried together with facts that have left. Runs inside a
        transaction."""
        self.store.db.set_meta(meta_keys.WEIGHTS_TRIALS, None)

    def _load_trials(self) -> list[tuple[int, dict[str, object]]]:
        trials = json.loads(self.store.db.get_meta(meta_keys.WEIGHTS_TRIALS) or "[]")
        return [(int(facts), figures) for facts, figures in trials]
