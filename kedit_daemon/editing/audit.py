"""The audit: measure what is served, judge it, record it, and act on the verdict."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from threading import Thread
from typing import Any

from kedit_daemon.config import Config
from kedit_daemon.editing.flush import Flush
from kedit_daemon.editing.generations import Generations
from kedit_daemon.editing.live_model import LiveModel
from kedit_daemon.editing.locality_check import LocalityCheck
from kedit_daemon.editing.repair import find_damage, read_active_hash, repair_damage
from kedit_daemon.editing.retention import Retention
from memory.canonical_json import to_canonical_json
from memory.db import meta_keys
from memory.db.event_log import read_head, verify_chain
from memory.db.rows import StoredFact
from memory.db.schema import check_file
from memory.db.store import Store
from memory.errors import KeditError
from memory.model.canary import Health
from memory.model.evidence import EvidenceCollector
from memory.side.shards import RoutingMatch
from policies.cooldown import Cooldown, PastAction, explain_hold
from policies.culprits import Culprits
from policies.edit_site import EditSite
from policies.health_limits import (
    ALL_STATEMENTS_LIMITS,
    Action,
    Limits,
    Thresholds,
    Verdict,
    judge_health,
)
from policies.rounding import find_equal_rounding

PULSE_SECONDS, MAX_PULSES = 1.0, 3600  # while the database is read


@dataclass
class Traffic:
    """Questions since the last audit, how many of them a fact of the side memory answered, and the
    least of these facts' margins over their thresholds."""

    asked: int = 0
    routed: int = 0
    least_margin: float | None = None

    def count_question(self, match: RoutingMatch | None) -> None:
        """Count a question, and the fact that fired for it."""
        self.asked += 1
        if match is not None:
            self.routed += 1
            self.least_margin = min(match.margin, self.least_margin or match.margin)


@dataclass(frozen=True)
class _Findings:
    """Findings of an audit, before anything is done about them."""

    damage: list[str]
    health: Health
    lost_facts: list[StoredFact]
    verdict: Verdict
    figures: dict[str, Any]


def make_thresholds(config: Config, site: EditSite) -> Thresholds:
    """Combine the configured limits with the model's own, which hold where none is configured.

    Limits for all statements (`agreement_*`), configured or in an older version's kedit.json, are
    judged as what they were made for: those for confident statements then replace them only if
    they are configured too. Raises KeditError if the limits of a figure do not rise.
    """
    configured, measured = vars(config.stability), vars(site)
    verdicts = vars(ALL_STATEMENTS_LIMITS)

    def find_limits(figure: str) -> Limits:
        names = {verdict: f"{figure}_{verdict}" for verdict in verdicts}
        # Agreement on all statements is the one figure that a site may have no limits of.
        values = {v: configured[n] or measured.get(n) or verdicts[v] for v, n in names.items()}
        limits = Limits(**values)
        if not limits.warn <= limits.consolidate <= limits.revert:
            raise KeditError(
                f"the {figure} limits do not rise: {limits}",
                code="bad-config",
                hint=f"set {figure}_warn, {figure}_consolidate and {figure}_revert together",
            )
        return limits

    def has_limits(figure: str, *sources: Mapping[str, Any]) -> bool:
        return any(source.get(f"{figure}_{verdict}") for source in sources for verdict in verdicts)

    found = Thresholds(**{field.name: find_limits(field.name) for field in fields(Thresholds)})
    if has_limits("agreement", configured, measured) and not has_limits("confident", configured):
        return replace(found, confident=None)
    return found


class Auditor:
    """Keeps the weights and the side memory healthy."""

    def __init__(
        self,
        live_model: LiveModel,
        store: Store,
        generations: Generations,
        flush: Flush,
        cooldown: Cooldown,
    ) -> None:
        self.live_model, self.store, self.generations = live_model, store, generations
        self.flush, self.quarantine, self.cooldown = flush, flush.quarantine, cooldown
        self.evidence = EvidenceCollector(live_model.loaded_model.canary)
        self.retention = Retention(live_model, store, generations)
        self.locality = LocalityCheck(live_model, store)
        self.traffic = Traffic()

    def audit(self, dry_run: bool = False) -> dict[str, Any]:
        """Repair what is damaged in memory, measure, judge, record, and act on the verdict; return
        the report. A dry run only measures and judges."""
        began = time.monotonic()
        found = self._collect_findings(repair=not dry_run)
        seconds, generation = time.monotonic() - began, self.store.artifacts.active_generation()
        action, reasons = found.verdict.action, [*found.damage, *found.verdict.reasons]
        report: dict[str, Any] = {
            "verdict": str(action),
            "reasons": reasons,
            "figures": found.figures,
            "seconds": seconds,
            "generation": generation,
        }
        if dry_run:
            asked = judge_health(found.health, self.generations.thresholds).action
            would = self._explain_hold(asked, found.health) or str(asked)
            return report | {"would": would, "dry_run": True}
        self.traffic = Traffic()
        with self.store.db.transaction():
            number = self.store.add_audit(generation, str(action), found.figures, reasons, seconds)
        acted = self._carry_out_verdict(found.health)
        lost = found.lost_facts
        sound = found.health.finite and found.figures["weights_as_written"]
        if lost and self.store.artifacts.active_generation() != generation:
            # What has left may have spoilt the others' answers; what is served now was measured.
            lost, sound = self._find_lost_facts(number)[1], True
        relearned = self.retention.relearn_facts(lost) if sound else []
        return report | {"audit": number, "acted": acted, "learned_anew": relearned}

    def _collect_findings(self, repair: bool) -> _Findings:
        """Collect the figures, with the seconds that each part of them took, and the verdict."""
        costs: dict[str, float] = {}
        with _record_seconds(costs, "hash"):
            weights = self._hash_weights()
        with _record_seconds(costs, "damage"):
            turn = self.store.newest_audit_id()
            damage = find_damage(self.live_model, weights, turn)
            if damage.reasons and repair:
                repair_damage(self.live_model, self.generations, self.flush, damage)
                weights = self._hash_weights()
        with _record_seconds(costs, "measure"):
            health = self.generations.measure_health()[0]
            readings = self.live_model.loaded_model.canary.latest_readings
        with _record_seconds(costs, "retention"):
            retention, lost = self._find_lost_facts(turn)
        with _record_seconds(costs, "locality"):
            locality = self.locality.ask(turn)
        with _record_seconds(costs, "database"):
            self._check_database()
        with _record_seconds(costs, "chain"):
            chain = verify_chain(self.store.db.conn, read_head(self.live_model.home.head_file))
        with _record_seconds(costs, "evidence"):
            count = len(self.live_model.list_weights_facts())
            evidence = self.evidence.collect_evidence(count, weights, readings)
        figures = health.as_dict() | {
            "retention": retention,
            "locality": None if locality is None else locality.as_dict(),
            "weights_as_written": read_active_hash(self.live_model) == weights,
            "chain_intact": chain.intact,
            "traffic": asdict(self.traffic),
            "evidence": evidence.as_dict(),
            "costs": costs,
        }
        bits = find_equal_rounding(health.kl, self.live_model.site.rounding_kl)
        if bits is not None:
            figures["rounding_bits"] = bits
        as_before = None if locality is None else locality.as_before
        verdict = judge_health(health, self.generations.thresholds, retention, as_before)
        return _Findings(damage.reasons, health, lost, verdict, figures)

    def _check_database(self) -> None:
        """Raise if the database is damaged. Reading a large one takes minutes, in which SQLite
        calls nobody: a thread reads it, and the loop pulses meanwhile."""
        outcome = Future[None]()

        def read_database() -> None:
            try:
                check_file(self.live_model.home.database_file, thorough=True)
            except BaseException as error:
                outcome.set_exception(error)
            else:
                outcome.set_result(None)

        # A daemon thread delays no stop: it only reads.
        Thread(target=read_database, name="database", daemon=True).start()
        for _ in range(MAX_PULSES):
            if wait((outcome,), PULSE_SECONDS).done:
                break
            self.flush.pulse()
        outcome.result()  # a disk that never answers is for systemd's watchdog to find

    def _find_lost_facts(self, turn: int) -> tuple[float | None, list[StoredFact]]:
        """Return the share of the oldest facts that are stated, and the facts that are not, of
        these and of others."""
        oldest, rotating = self.retention.ask_oldest(), self.retention.ask_rotating(turn)
        return oldest.stated_share, [*oldest.lost_facts, *rotating.lost_facts]

    def _hash_weights(self) -> str:
        return self.live_model.model.weights_hash(self.live_model.loaded_model.layers)

    # Actions ------------------------------------------------------------------------------------

    def _explain_hold(self, action: Action, health: Health) -> str | None:
        """Explain why an action has to wait; None if it need not."""
        if not health.finite:
            return None
        armed = self.store.db.get_meta(meta_keys.AUDIT_DISARMED) is None
        now = self.store.db.format_now()
        return explain_hold(action, self._load_actions(), armed, now, self.cooldown)

    def _carry_out_verdict(self, health: Health) -> str:
        """Act on the figures of the weights, and describe what was done. (Facts that are not stated
        any more are relearned: neither a solve nor a revert would help them.)"""
        thresholds = self.generations.thresholds
        verdict = judge_health(health, thresholds)
        clearly_healthy = judge_health(health, thresholds.ease_limits()).action < Action.CONSOLIDATE
        if clearly_healthy and self.store.db.get_meta(meta_keys.AUDIT_DISARMED) is not None:
            with self.store.db.transaction():
                self.store.db.set_meta(meta_keys.AUDIT_DISARMED, None)
        if verdict.action < Action.CONSOLIDATE:
            return "nothing"
        if why := self._explain_hold(verdict.action, health):
            return f"nothing: {why}"
        self._record_action(verdict.action)
        if verdict.action is Action.REVERT:
            return self._quarantine_culprits(verdict)
        done = self.generations.consolidate(dry_run=False)
        if done["taken"]:
            return "consolidated"
        return "; ".join(done["reasons"]) or "already the joint solve"

    def _load_actions(self) -> list[PastAction]:
        """Load past actions. One of the future (the clock was set back since) becomes one of
        now."""
        now = self.store.db.format_now()
        kept = json.loads(self.store.db.get_meta(meta_keys.AUDIT_ACTS) or "[]")
        actions = [PastAction(min(at, now), action) for at, action in kept]
        if any(at > now for at, _ in kept):
            self._save_actions(actions)
        return actions

    def _save_actions(self, actions: Sequence[PastAction]) -> None:
        pairs = to_canonical_json([[one.at, one.action] for one in actions])
        with self.store.db.transaction():
            self.store.db.set_meta(meta_keys.AUDIT_ACTS, pairs)

    def _record_action(self, action: Action) -> None:
        """Record an action before it is done: if it fails, it must not be tried again at once."""
        actions = [*self._load_actions(), PastAction(self.store.db.format_now(), str(action))]
        self._save_actions(actions[-self.cooldown.daily_budget :])
        if action is Action.CONSOLIDATE:
            with self.store.db.transaction():
                self.store.db.set_meta(meta_keys.AUDIT_DISARMED, "1")

    def _quarantine_culprits(self, verdict: Verdict) -> str:
        """Quarantine the culprits of the last batch, or of all facts, and learn the surplus in the
        side memory. Describe what was done."""
        artifacts = self.store.artifacts
        row = artifacts.get_generation(artifacts.active_generation())
        older = () if row.parent is None else artifacts.get_generation(row.parent).fact_ids
        found = self._find_culprits(row.fact_ids, older) or self._find_culprits(row.fact_ids, ())
        if found is None:
            return "nothing to revert"
        self.quarantine.quarantine_facts(found.culprits, found.surplus, "; ".join(verdict.reasons))
        moved = f"moved {len(found.surplus)} to the side memory"
        return f"quarantined {len(found.culprits)} facts, {moved}"

    def _find_culprits(
        self, ids: Sequence[str], older: Sequence[str]
    ) -> Culprits[StoredFact] | None:
        """Find the culprits among the facts in the weights that are not `older`, if any."""
        kept = [n for n in ids if n in older]
        suspects = [f for n in ids if n not in older and (f := self.store.find_fact(n))]

        def select_ids(part: Sequence[StoredFact]) -> list[str]:
            return [*kept, *(f.id for f in part)]

        found = self.quarantine.find_culprits(suspects, select_ids)
        return found if found.culprits or found.surplus else None


@contextmanager
def _record_seconds(costs: dict[str, float], part: str) -> Iterator[None]:
    """Record the seconds that the block took."""
    began = time.monotonic()
    yield
    costs[part] = time.monotonic() - began
