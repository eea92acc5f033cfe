"""The daemon's own tiers on the bench: its editor and its flush, on a home made for the run."""

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import UTC, datetime

from kedit_daemon.bench.method import Method, Setup, Stopwatch
from kedit_daemon.config import Config, FlushConfig, StabilityConfig
from kedit_daemon.editing.audit import thresholds
from kedit_daemon.editing.editor import Editor
from kedit_daemon.editing.flush import Flush
from kedit_daemon.editing.generations import Weights
from kedit_daemon.editing.live_model import Served
from kedit_daemon.home import Home
from memory.db.rows import StoredFact
from memory.db.store import Store
from memory.facts import LIVE, Fact, State
from memory.model.canary import Health
from memory.model.generate import Overlay
from policies.routing import Route, decide, wants_batch
from policies.stability import Thresholds, Verdict

NO_LIMIT = 1e30  # what `--no-policy` sets every threshold to
FIGURES = ("norm", "perplexity", "activation", "agreement", "retention")
VERDICTS = ("warn", "consolidate", "revert")
OVER = (State.SUPERSEDED, State.REVERTED)  # a fact that comes again after that is a new one


def config_of(setup: Setup) -> Config:
    """The daemon's settings: its defaults, with the batch and the policy of this run."""
    free = {f"{figure}_{verdict}": NO_LIMIT for figure in FIGURES for verdict in VERDICTS}
    limits = setup.limits if setup.policy else free
    return Config(
        flush=FlushConfig(batch_facts=setup.batch_size),
        stability=StabilityConfig.model_validate(limits),
    )


class _Daemon(Method):
    """A home with everything that the daemon has around its editor."""

    keeps = True

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.config = config_of(setup)
        if not setup.policy:
            site = replace(self.loaded.site, anchors={})
            self.loaded = replace(self.loaded, site=site)
        self.home = Home(setup.folder / "home")
        self.home.create()
        self.store = Store(self.home.database, lambda: datetime.now(UTC))
        self.served = Served(self.loaded, self.store, self.home)
        self.served.restore()
        self._heard = 0.0  # when the work was last heard of

    def pulse(self) -> None:
        """The work tells that it goes on."""
        self._heard = time.perf_counter()

    def edit(self, facts: Sequence[Fact]) -> None:
        """Hand the facts in, and let the tiers work until the batch is settled.

        Of a batch that was cut off, what has been done is left as it is.
        """
        direct = self.direct(len(facts))
        with self.store.transaction():
            for fact in facts:
                known = self.store.fact(fact.id)
                if known is None or known.state in OVER:
                    self.store.receive(fact, "bench", direct)
        stored = [f for fact in facts if (f := self.store.fact(fact.id))]
        self.settle([f for f in stored if f.state is State.RECEIVED and not f.attempts])
        ids = {fact.id for fact in facts}
        live = {f.id for f in self.store.facts(LIVE)}
        self.not_edited += len(ids - live)

    def direct(self, in_batch: int) -> bool:
        """Whether a batch of so many facts goes straight to the weights."""
        raise NotImplementedError

    def settle(self, received: Sequence[StoredFact]) -> None:
        """Work on the facts that wait and have not been tried."""
        raise NotImplementedError

    @property
    def overlay(self) -> Overlay | None:
        """The side memory, where it holds a fact."""
        if not self.served.side.shard_of:
            return None

        def over(_places: list[int]) -> AbstractContextManager[None]:
            return self.served.side.overlay([])

        return over

    def stored_bytes(self) -> int:
        """Terms and retrieval keys in the database, and the shards' files."""
        terms = [f.id for f in self.store.facts() if self.store.has_terms(f.id)]
        in_database = sum(len(self.store.terms(fact_id)) for fact_id in terms)
        in_database += sum(len(row.blob) for row in self.store.side_rows())
        named = {row.sha256 for row in self.store.shards()}
        files = [path for path in self.home.side.iterdir() if path.stem in named]
        return in_database + sum(path.stat().st_size for path in files)

    def close(self) -> None:
        """Close the database."""
        self.store.close()


class _TimedWeights(Weights):
    """Weights that tell what their time is spent on."""

    def __init__(self, served: Served, limits: Thresholds, watch: Stopwatch) -> None:
        super().__init__(served, limits)
        self.watch = watch

    def solve(self, ids: Sequence[str]) -> None:
        with self.watch.part("solve"):
            super().solve(ids)

    def measured(self) -> tuple[Health, Verdict]:
        with self.watch.part("audit"):
            return super().measured()


class MemitMass(_Daemon):
    """Every batch straight into the weights, as one flush."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        limits = thresholds(self.config, self.loaded.site)
        weights = _TimedWeights(self.served, limits, self.watch)
        most = self.config.inbox.max_attempts
        self.flush = Flush(weights, most, self.pulse, selective=setup.policy)

    def direct(self, in_batch: int) -> bool:
        """Always."""
        return True

    def settle(self, received: Sequence[StoredFact]) -> None:
        """One flush, and more while there is room for facts that it has left. What does not hold
        in the weights is not tried in the side memory."""
        left = received
        while left and self._flushed(left):
            waiting = self.store.facts((State.RECEIVED,))
            left = [f for f in waiting if f in received]  # as they came: not tried yet

    def _flushed(self, batch: Sequence[StoredFact]) -> bool:
        """One flush, with its time told apart; whether any fact has come into the weights."""
        began = self._heard = time.perf_counter()
        before = sum(self.watch.parts.values())
        result = self.flush.run(batch, "bench", dry_run=False)
        total = time.perf_counter() - began
        self.watch.add("targets", self._heard - began)  # a flush pulses while it computes these
        spent = sum(self.watch.parts.values()) - before
        self.watch.add("probe", total - spent)
        return bool(result["flushed"])


class Wise(_Daemon):
    """Every batch into the side memory, which is never flushed."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(setup)
        self.editor = Editor(self.served, self.config, self.pulse)

    def direct(self, in_batch: int) -> bool:
        """Never."""
        return False

    def settle(self, received: Sequence[StoredFact]) -> None:
        """The editor's steps, as long as they are for the side memory."""
        while self._for_side():
            self._step()

    def _for_side(self) -> bool:
        return any(not wants_batch(f) for f in self.store.facts((State.RECEIVED,)))

    def _step(self) -> bool:
        began = self._heard = time.perf_counter()
        worked = self.editor.step()
        self.watch.add("learn", self._heard - began)  # a shard pulses while it is trained
        self.watch.add("probe", time.perf_counter() - self._heard)
        return worked


class Auto(Wise):
    """Both tiers, as the daemon would: side memory, flush and retries by its own rules."""

    def direct(self, in_batch: int) -> bool:
        """As for a file of so many facts."""
        most = self.config.routing.direct_facts
        return decide(None, None, self.store.now(), in_batch, most).route is Route.BATCH

    def settle(self, received: Sequence[StoredFact]) -> None:
        """Every step that the editor would take."""
        worked = True
        while worked:
            if self._for_side():
                worked = self._step()
                continue
            with self.watch.part("flush"):
                worked = self.editor.step()
