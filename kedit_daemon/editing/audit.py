"""The audit: what is served is measured, judged and written down, and the verdict carried out."""

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from threading import Thread
from typing import Any

from kedit_daemon.config import Config
from kedit_daemon.editing.flush import Flush
from kedit_daemon.editing.repair import look, mend, published
from kedit_daemon.editing.retention import Retention
from memory.db.event_log import canonical, read_head, verify
from memory.db.rows import StoredFact
from memory.db.schema import examine
from memory.errors import KeditError
from memory.model.canary import Health
from memory.model.evidence import Examiner
from memory.side.side_memory import Match
from policies.cooldown import Acted, Restraint, held_back
from policies.culprits import Guilt
from policies.edit_site import EditSite
from policies.stability import Action, Limits, Thresholds, Verdict, judge

ACTS = "audit_acts"  # in the store's meta: [when, what], the newest last
DISARMED = "audit_disarmed"  # while the weights have not been clearly well since a consolidation
PULSE_SECONDS, MOST_PULSES = 1.0, 3600  # while the database is read


@dataclass
class Traffic:
    """What was asked since the last audit: how often, how often a fact of the side memory answered,
    and the least of their margins over the thresholds."""

    asked: int = 0
    routed: int = 0
    least_margin: float | None = None

    def count(self, match: Match | None) -> None:
        """One more question, and the fact that answered."""
        self.asked += 1
        if match is not None:
            self.routed += 1
            self.least_margin = min(match.margin, self.least_margin or match.margin)


@dataclass(frozen=True)
class _Findings:
    """What an audit found, before anything is done about it."""

    damage: list[str]
    health: Health
    lost: list[StoredFact]
    verdict: Verdict
    figures: dict[str, Any]


def thresholds(config: Config, site: EditSite) -> Thresholds:
    """The configured limits, and the model's own for the norm where none is configured."""
    at = config.stability
    result = Thresholds(
        norm=Limits(
            at.norm_warn or site.norm_warn,
            at.norm_consolidate or site.norm_consolidate,
            at.norm_revert or site.norm_revert,
        ),
        perplexity=Limits(at.perplexity_warn, at.perplexity_consolidate, at.perplexity_revert),
        activation=Limits(
            at.activation_warn or site.activation_warn,
            at.activation_consolidate or site.activation_consolidate,
            at.activation_revert or site.activation_revert,
        ),
        agreement=Limits(
            at.agreement_warn or site.agreement_warn,
            at.agreement_consolidate or site.agreement_consolidate,
            at.agreement_revert or site.agreement_revert,
        ),
        retention=Limits(at.retention_warn, at.retention_consolidate, at.retention_revert),
    )
    for figure, limits in vars(result).items():
        if not limits.warn <= limits.consolidate <= limits.revert:
            raise KeditError(
                f"the {figure} limits do not rise: {limits}",
                code="bad-config",
                hint=f"set {figure}_warn, {figure}_consolidate and {figure}_revert together",
                exit_code=78,
            )
    return result


class Auditor:
    """Looks after the weights and the side memory that are served."""

    def __init__(self, flush: Flush, restraint: Restraint) -> None:
        self.flush, self.weights, self.quarantine = flush, flush.weights, flush.quarantine
        self.served, self.store, self.restraint = flush.served, flush.store, restraint
        self.examiner = Examiner(self.served.loaded.canary)
        self.retention = Retention(self.weights)
        self.traffic = Traffic()

    def audit(self, dry_run: bool = False) -> dict[str, Any]:
        """Mend what is damaged in memory, measure, judge, write it down, and do what the verdict
        says. A dry run measures and judges what is there."""
        began = time.monotonic()
        found = self._find(mending=not dry_run)
        seconds, generation = time.monotonic() - began, self.store.active_generation()
        action, reasons = found.verdict.action, [*found.damage, *found.verdict.reasons]
        result: dict[str, Any] = {
            "verdict": str(action),
            "reasons": reasons,
            "figures": found.figures,
            "seconds": seconds,
            "generation": generation,
        }
        if dry_run:
            asked = judge(found.health, self.weights.thresholds).action
            would = self._held_back(asked, found.health) or str(asked)
            return result | {"would": would, "dry_run": True}
        self.traffic = Traffic()
        with self.store.transaction():
            number = self.store.add_audit(generation, str(action), found.figures, reasons, seconds)
        acted = self._act(found.health)
        lost = found.lost
        sound = found.health.finite and found.figures["weights_as_written"]
        if lost and self.store.active_generation() != generation:
            # What has left may have spoilt the others' answers; what is served now was measured.
            lost, sound = self._lost(number)[1], True
        anew = self.retention.learn_anew(lost) if sound else []
        return result | {"audit": number, "acted": acted, "learned_anew": anew}

    def _find(self, mending: bool) -> _Findings:
        """What an audit writes down, with what each part of it took in seconds; and the verdict."""
        costs: dict[str, float] = {}
        with _timed(costs, "hash"):
            weights = self._hash()
        with _timed(costs, "damage"):
            turn = next((row.id for row in self.store.audits(1)), 0)
            broken = look(self.served, weights, turn)
            if broken.reasons and mending:
                mend(self.flush, broken)
                weights = self._hash()
        with _timed(costs, "measure"):
            health = self.weights.measured()[0]
            seen = self.served.loaded.canary.seen
        with _timed(costs, "retention"):
            retention, lost = self._lost(turn)
        with _timed(costs, "database"):
            self._examine()
        with _timed(costs, "chain"):
            chain = verify(self.store.conn, read_head(self.served.home.head))
        with _timed(costs, "evidence"):
            evidence = self.examiner.take(len(self.served.weights_facts()), weights, seen)
        figures = health.as_dict() | {
            "retention": retention,
            "weights_as_written": published(self.served) == weights,
            "chain_intact": chain.intact,
            "traffic": asdict(self.traffic),
            "evidence": evidence.as_dict(),
            "costs": costs,
        }
        verdict = judge(health, self.weights.thresholds, retention)
        return _Findings(broken.reasons, health, lost, verdict, figures)

    def _examine(self) -> None:
        """Refuse a damaged database. A large one takes minutes to read, within which SQLite calls
        nobody: a thread reads it, and the loop shows meanwhile that it is alive."""
        found = Future[None]()

        def look() -> None:
            try:
                examine(self.served.home.database, thorough=True)
            except BaseException as error:
                found.set_exception(error)
            else:
                found.set_result(None)

        # As a daemon's thread it holds up no stop: it only reads.
        Thread(target=look, name="database", daemon=True).start()
        for _ in range(MOST_PULSES):
            if wait((found,), PULSE_SECONDS).done:
                break
            self.flush.pulse()
        found.result()  # a disk that never answers is for systemd's watchdog to find

    def _lost(self, turn: int) -> tuple[float | None, list[StoredFact]]:
        """Share of the oldest facts that are stated; what of them, and of others, is not."""
        oldest = self.retention.oldest()
        return oldest.share, [*oldest.lost, *self.retention.in_turn(turn).lost]

    def _hash(self) -> str:
        return self.served.model.weights_hash(self.served.loaded.layers)

    # What is done -------------------------------------------------------------------------------

    def _held_back(self, action: Action, health: Health) -> str | None:
        if not health.finite:
            return None
        armed = self.store.meta(DISARMED) is None
        return held_back(action, self._acts(), armed, self.store.now(), self.restraint)

    def _act(self, health: Health) -> str:
        """Do what the weights' own figures ask for. (What is not stated any more is learned anew:
        neither a solve nor a revert would help it.)"""
        verdict = judge(health, self.weights.thresholds)
        well = judge(health, self.weights.thresholds.eased()).action < Action.CONSOLIDATE
        if well and self.store.meta(DISARMED) is not None:
            with self.store.transaction():
                self.store.set_meta(DISARMED, None)
        if verdict.action < Action.CONSOLIDATE:
            return "nothing"
        if why := self._held_back(verdict.action, health):
            return f"nothing: {why}"
        self._remember(verdict.action)
        if verdict.action is Action.REVERT:
            return self._quarantine(verdict)
        done = self.weights.consolidate(dry_run=False)
        if done["taken"]:
            return "consolidated"
        return "; ".join(done["reasons"]) or "already the joint solve"

    def _acts(self) -> list[Acted]:
        """Those of the past. One of the future (the clock was set back since) is one of now."""
        now, kept = self.store.now(), json.loads(self.store.meta(ACTS) or "[]")
        acts = [Acted(min(at, now), action) for at, action in kept]
        if any(at > now for at, _ in kept):
            self._keep(acts)
        return acts

    def _keep(self, acts: Sequence[Acted]) -> None:
        with self.store.transaction():
            self.store.set_meta(ACTS, canonical([[act.at, act.action] for act in acts]))

    def _remember(self, action: Action) -> None:
        """Before it is done: what fails must not be tried again at once either."""
        acts = [*self._acts(), Acted(self.store.now(), str(action))]
        self._keep(acts[-self.restraint.budget :])
        if action is Action.CONSOLIDATE:
            with self.store.transaction():
                self.store.set_meta(DISARMED, "1")

    def _quarantine(self, verdict: Verdict) -> str:
        """Find who of the last batch is to blame, or of all, and take them out of the weights.
        Who is not to blame and yet too much is learned in the side memory."""
        row = self.store.generation(self.store.active_generation())
        older = self.store.generation(row.parent).fact_ids if row.parent is not None else ()
        found = self._to_blame(row.fact_ids, older) or self._to_blame(row.fact_ids, ())
        if found is None:
            return "nothing to revert"
        self.quarantine.lock_up(found.guilty, found.crowd, "; ".join(verdict.reasons))
        return f"quarantined {len(found.guilty)} facts, moved {len(found.crowd)} beside the weights"

    def _to_blame(self, ids: Sequence[str], older: Sequence[str]) -> Guilt[StoredFact] | None:
        """Who of the facts in the weights, without the older ones, makes them sick."""
        beside = [n for n in ids if n in older]
        suspects = [f for n in ids if n not in older and (f := self.store.fact(n))]

        def with_those(some: Sequence[StoredFact]) -> list[str]:
            return [*beside, *(f.id for f in some)]

        found = self.quarantine.search(suspects, with_those)
        return found if found.guilty or found.crowd else None


@contextmanager
def _timed(costs: dict[str, float], part: str) -> Iterator[None]:
    """Note how many seconds the block took."""
    began = time.monotonic()
    yield
    costs[part] = time.monotonic() - began
