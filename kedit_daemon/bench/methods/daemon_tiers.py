"""MEMIT-MASS, WISE and auto: the daemon's own flush and editor, on a home made for the run."""

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from torch import Tensor

from kedit_daemon.bench.methods.method import Method, MethodSetup, Stopwatch
from kedit_daemon.config import Config, FlushConfig, StabilityConfig
from kedit_daemon.editing.audit import make_thresholds
from kedit_daemon.editing.editor import Editor
from kedit_daemon.editing.fact_lifecycle import Lifecycle
from kedit_daemon.editing.flush import Flush
from kedit_daemon.editing.generations import Generations
from kedit_daemon.editing.live_model import LiveModel
from kedit_daemon.home import Home
from memory.db.rows import StoredFact
from memory.db.store import Store
from memory.facts import LIVE_STATES, Fact, FactState
from memory.model.canary import Health
from memory.model.generate import Overlay
from memory.side.row_overlay import RowOverlay
from policies.edit_terms import Refusal
from policies.health_limits import Thresholds, Verdict
from policies.routing import is_for_batch

NO_LIMIT = 1e30  # every threshold under --no-policy
FIGURES = ("norm", "perplexity", "activation", "agreement", "retention")
VERDICTS = ("warn", "consolidate", "revert")
ENDED_STATES = (FactState.SUPERSEDED, FactState.REVERTED)  # if submitted again, it is a new fact


def build_config(setup: MethodSetup) -> Config:
    """Build the daemon's default configuration with the batch size and policy of this run."""
    free = {f"{figure}_{verdict}": NO_LIMIT for figure in FIGURES for verdict in VERDICTS}
    limits = setup.policy_limits if setup.has_policy else free
    return Config(
        flush=FlushConfig(batch_facts=setup.batch_size),
        stability=StabilityConfig.model_validate(limits),
    )


class _DaemonMethod(Method):
    """A home with everything the daemon has around its editor."""

    is_resumable = True

    def __init__(self, setup: MethodSetup) -> None:
        super().__init__(setup)
        self.config = build_config(setup)
        if not setup.has_policy:
            site = replace(self.loaded_model.site, anchors={})
            self.loaded_model = replace(self.loaded_model, site=site)
        self.home = Home(setup.folder / "home")
        self.home.create_folders()
        self.store = Store(self.home.database_file, lambda: datetime.now(UTC))
        self.live_model = LiveModel(self.loaded_model, self.store, self.home)
        self.live_model.restore()
        self._last_pulse = 0.0  # time of the work's last sign of progress

    def note_progress(self) -> None:
        """Note the time: the work is in progress."""
        self._last_pulse = time.perf_counter()

    def edit(self, facts: Sequence[Fact]) -> None:
        """Submit the facts, and let the tiers work until the batch is settled.

        The finished part of an interrupted batch is left as it is.
        """
        direct = self.goes_to_weights(len(facts))
        with self.store.db.transaction():
            for fact in facts:
                known = self.store.find_fact(fact.id)
                if known is None or known.state in ENDED_STATES:
                    self.store.receive_fact(fact, "bench", direct)
        stored = [f for fact in facts if (f := self.store.find_fact(fact.id))]
        self.settle_facts([f for f in stored if f.state is FactState.RECEIVED and not f.attempts])
        ids = {fact.id for fact in facts}
        live = {f.id for f in self.store.list_facts(LIVE_STATES)}
        self.not_edited += len(ids - live)

    def goes_to_weights(self, in_batch: int) -> bool:
        """Check whether a batch of `in_batch` facts goes straight to the weights."""
        raise NotImplementedError

    def settle_facts(self, received: Sequence[StoredFact]) -> None:
        """Work on the facts that wait and have not been tried yet."""
        raise NotImplementedError

    @property
    def overlay(self) -> Overlay | None:
        """The side memory, if it holds a fact."""
        side = self.live_model.side
        return (lambda _places: RowOverlay(side).follow_passes()) if side.shard_ids else None

    def count_stored_bytes(self) -> int:
        terms = [f.id for f in self.store.list_facts() if self.store.artifacts.has_terms(f.id)]
        in_database = sum(len(self.store.artifacts.read_terms(fact_id)) for fact_id in terms)
        in_database += sum(len(row.blob) for row in self.store.artifacts.read_side_keys())
        named = {row.sha256 for row in self.store.artifacts.list_shards()}
        files = [path for path in self.home.side_folder.iterdir() if path.stem in named]
        return in_database + sum(path.stat().st_size for path in files)

    def close(self) -> None:
        self.store.close()


class _TimedGenerations(Generations):
    """Generations that time their solves and audits."""

    def __init__(
        self,
        live_model: LiveModel,
        store: Store,
        lifecycle: Lifecycle,
        thresholds: Thresholds,
        stopwatch: Stopwatch,
    ) -> None:
        super().__init__(live_model, store, lifecycle, thresholds)
        self.stopwatch = stopwatch

    def solve(self, ids: Sequence[str]) -> dict[int, Tensor]:
        with self.stopwatch.time_part("solve"):
            return super().solve(ids)

    def measure_health(self) -> tuple[Health, Verdict]:
        with self.stopwatch.time_part("audit"):
            return super().measure_health()


class _TimedFlush(Flush):
    """A flush that times its targets."""

    def __init__(self, stopwatch: Stopwatch, *parts: Any, **more: Any) -> None:
        """parts, more: the arguments of a flush."""
        super().__init__(*parts, **more)
        self.stopwatch = stopwatch

    def ensure_terms(self, facts: Sequence[Fact], *, again: bool = False) -> dict[str, Refusal]:
        with self.stopwatch.time_part("targets"):
            return super().ensure_terms(facts, again=again)


class MemitMass(_DaemonMethod):
    """MEMIT-MASS: every batch straight into the weights, as one flush."""

    def __init__(self, setup: MethodSetup) -> None:
        super().__init__(setup)
        lifecycle = Lifecycle(self.store, self.config.inbox.max_attempts)
        thresholds = make_thresholds(self.config, self.loaded_model.site)
        parts = self.live_model, self.store, lifecycle
        generations = _TimedGenerations(*parts, thresholds, self.stopwatch)
        work = *parts, generations, self.note_progress
        self.flush = _TimedFlush(self.stopwatch, *work, selective=setup.has_policy)

    def goes_to_weights(self, in_batch: int) -> bool:
        return True

    def settle_facts(self, received: Sequence[StoredFact]) -> None:
        """Flush, and again while there is capacity for facts that the flush has left.

        Facts that the weights do not hold are not tried in the side memory.
        """
        left = received
        while left and self._flush_batch(left):
            waiting = self.store.list_facts((FactState.RECEIVED,))
            left = [f for f in waiting if f in received]  # unchanged, so not tried yet

    def _flush_batch(self, batch: Sequence[StoredFact]) -> bool:
        """Flush once, timing its parts, and return whether a fact has come into the weights."""
        began, before = time.perf_counter(), sum(self.stopwatch.seconds_by_part.values())
        result = self.flush.flush_batch(batch, "bench", dry_run=False)
        total = time.perf_counter() - began
        spent = sum(self.stopwatch.seconds_by_part.values()) - before
        self.stopwatch.add_seconds("probe", total - spent)
        return bool(result["flushed"])


class Wise(_DaemonMethod):
    """WISE: every batch into the side memory, which is never flushed."""

    def __init__(self, setup: MethodSetup) -> None:
        super().__init__(setup)
        self.editor = Editor(self.live_model, self.config, self.note_progress)

    def goes_to_weights(self, in_batch: int) -> bool:
        return False

    def settle_facts(self, received: Sequence[StoredFact]) -> None:
        """Take the editor's steps as long as they are for the side memory."""
        while self._has_side_work():
            self._run_step()
        with self.stopwatch.time_part("chat"):  # when the daemon is idle
            while self.editor.chat_prober.step():
                pass

    def _has_side_work(self) -> bool:
        return any(not is_for_batch(f) for f in self.store.list_facts((FactState.RECEIVED,)))

    def _run_step(self) -> bool:
        began = self._last_pulse = time.perf_counter()
        worked = self.editor.step()
        # A shard pulses while it is trained.
        self.stopwatch.add_seconds("learn", self._last_pulse - began)
        self.stopwatch.add_seconds("probe", time.perf_counter() - self._last_pulse)
        return worked


class Auto(Wise):
    """Both tiers as in the daemon: side memory, flushes and retries by its own rules."""

    def goes_to_weights(self, in_batch: int) -> bool:
        """Route the batch like a file of `in_batch` facts."""
        return in_batch >= self.config.routing.direct_facts

    def settle_facts(self, received: Sequence[StoredFact]) -> None:
        """Take every step that the editor would take."""
        worked = True
        while worked:
            if self._has_side_work():
                worked = self._run_step()
                continue
            with self.stopwatch.time_part("flush"):
                worked = self.editor.step()
