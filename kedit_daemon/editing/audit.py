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
from kedit_daemon.editing.repair import find_damage, read_active_hash, repair_damage
from kedit_daemon.editing.retention import Retention
from memory.db import meta_keys
from memory.db.event_log import read_head, to_canonical_json, verify_chain
from memory.db.rows import StoredFact
from memory.db.schema import check_file
from memory.errors import KeditError
from memory.model.canary import Health
from memory.model.evidence import EvidenceCollector
from memory.side.side_memory import RoutingMatch
from policies.cooldown import Cooldown, PastAction, explain_hold
from policies.culprits import Culprits
from policies.edit_site import EditSite
from policies.stability import Action, Limits, Thresholds, Verdict, judge_health

PULSE_SECONDS, MAX_PULSES = 1.0, 3600  # while the database is read


@dataclass
class Traffic:
    """What was asked since the last audit: how often, how often a fact of the side memory answered,
    and the least of their margins over the thresholds."""

    asked: int = 0
    routed: int = 0
    least_margin: float | None = None

    def count_question(self, match: RoutingMatch | None) -> None:
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
    lost_facts: list[StoredFact]
    verdict: Verdict
    figures: dict[str, Any]


def make_thresholds(config: Config, site: EditSite) -> Thresholds:
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
            )
    return result


class Auditor:
    """Looks after the weights and the side memory that are served."""

    def __init__(self, flush: Flush, restraint: Cooldown) -> None:
        self.flush, self.generations, self.quarantine = flush, flush.generations, flush.quarantine
        self.live_model, self.store, self.cooldown = flush.live_model, flush.store, restraint
        self.examiner = EvidenceCollector(self.live_model.loaded_model.canary)
        self.retention = Retention(self.generations)
        self.traffic = Traffic()

    def audit(self, dry_run: bool = False) -> dict[str, Any]:
        """Mend what is damaged in memory, measure, judge, write it down, and do what the verdict
        says. A dry run measures and judges what is there."""
        began = time.monotonic()
        found = self._collect_findings(mending=not dry_run)
        seconds, generation = time.monotonic() - began, self.store.artifacts.active_generation()
        action, reasons = found.verdict.action, [*found.damage, *found.verdict.reasons]
        result: dict[str, Any] = {
            "verdict": str(action),
            "reasons": reasons,
            "figures": found.figures,
            "seconds": seconds,
            "generation": generation,
        }
        if dry_run:
            asked = judge_health(found.health, self.generations.thresholds).action
            would = self._explain_hold(asked, found.health) or str(asked)
            return result | {"would": would, "dry_run": True}
        self.traffic = Traffic()
        with self.store.db.transaction():
            number = self.store.add_audit(generation, str(action), found.figures, reasons, seconds)
        acted = self._carry_out_verdict(found.health)
        lost = found.lost_facts
        sound = found.health.finite and found.figures["weights_as_written"]
        if lost and self.store.artifacts.active_generation() != generation:
            # What has left may have spoilt the others' answers; what is served now was measured.
            lost, sound = self._find_lost_facts(number)[1], True
        anew = self.retention.relearn_facts(lost) if sound else []
        return result | {"audit": number, "acted": acted, "learned_anew": anew}

    def _collect_findings(self, mending: bool) -> _Findings:
        """What an audit writes down, with what each part of it took in seconds; and the verdict."""
        costs: dict[str, float] = {}
        with _record_seconds(costs, "hash"):
            weights = self._hash_weights()
        with _record_seconds(costs, "damage"):
            turn = self.store.newest_audit_id()
            broken = find_damage(self.live_model, weights, turn)
            if broken.reasons and mending:
                repair_damage(self.flush, broken)
                weights = self._hash_weights()
        with _record_seconds(costs, "measure"):
            health = self.generations.measure_health()[0]
            seen = self.live_model.loaded_model.canary.latest_readings
        with _record_seconds(costs, "retention"):
            retention, lost = self._find_lost_facts(turn)
        with _record_seconds(costs, "database"):
            self._check_database()
        with _record_seconds(costs, "chain"):
            chain = verify_chain(self.store.db.conn, read_head(self.live_model.home.head_file))
        with _record_seconds(costs, "evidence"):
            evidence = self.examiner.collect_evidence(
                len(self.live_model.list_weights_facts()), weights, seen
            )
        figures = health.as_dict() | {
            "retention": retention,
            "weights_as_written": read_active_hash(self.live_model) == weights,
            "chain_intact": chain.intact,
            "traffic": asdict(self.traffic),
            "evidence": evidence.as_dict(),
            "costs": costs,
        }
        verdict = judge_health(health, self.generations.thresholds, retention)
        return _Findings(broken.reasons, health, lost, verdict, figures)

    def _check_database(self) -> None:
        """Refuse a damaged database. A large one takes minutes to read, within which SQLite calls
        nobody: a thread reads it, and the loop shows meanwhile that it is alive."""
        found = Future[None]()

        def read_database() -> None:
            try:
                check_file(self.live_model.home.database_file, thorough=True)
            except BaseException as error:
                found.set_exception(error)
            else:
                found.set_result(None)

        # As a daemon's thread it holds up no stop: it only reads.
        Thread(target=read_database, name="database", daemon=True).start()
        for _ in range(MAX_PULSES):
            if wait((found,), PULSE_SECONDS).done:
                break
            self.flush.pulse()
        found.result()  # a disk that never answers is for systemd's watchdog to find

    def _find_lost_facts(self, turn: int) -> tuple[float | None, list[StoredFact]]:
        """Share of the oldest facts that are stated; what of them, and of others, is not."""
        oldest = self.retention.ask_oldest()
        return oldest.stated_share, [
            *oldest.lost_facts,
            *self.retention.ask_rotating(turn).lost_facts,
        ]

    def _hash_weights(self) -> str:
        return self.live_model.model.weights_hash(self.live_model.loaded_model.layers)

    # What is done -------------------------------------------------------------------------------

    def _explain_hold(self, action: Action, health: Health) -> str | None:
        if not health.finite:
            return None
        armed = self.store.db.get_meta(meta_keys.AUDIT_DISARMED) is None
        return explain_hold(
            action, self._load_actions(), armed, self.store.db.format_now(), self.cooldown
        )

    def _carry_out_verdict(self, health: Health) -> str:
        """Do what the weights' own figures ask for. (What is not stated any more is learned anew:
        neither a solve nor a revert would help it.)"""
        verdict = judge_health(health, self.generations.thresholds)
        well = (
            judge_health(health, self.generations.thresholds.ease_limits()).action
            < Action.CONSOLIDATE
        )
        if well and self.store.db.get_meta(meta_keys.AUDIT_DISARMED) is not None:
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
        """Those of the past. One of the future (the clock was set back since) is one of now."""
        now = self.store.db.format_now()
        kept = json.loads(self.store.db.get_meta(meta_keys.AUDIT_ACTS) or "[]")
        acts = [PastAction(min(at, now), action) for at, action in kept]
        if any(at > now for at, _ in kept):
            self._save_actions(acts)
        return acts

    def _save_actions(self, acts: Sequence[PastAction]) -> None:
        with self.store.db.transaction():
            text = to_canonical_json([[act.at, act.action] for act in acts])
            self.store.db.set_meta(meta_keys.AUDIT_ACTS, text)

    def _record_action(self, action: Action) -> None:
        """Before it is done: what fails must not be tried again at once either."""
        acts = [*self._load_actions(), PastAction(self.store.db.format_now(), str(action))]
        self._save_actions(acts[-self.cooldown.daily_budget :])
        if action is Action.CONSOLIDATE:
            with self.store.db.transaction():
                self.store.db.set_meta(meta_keys.AUDIT_DISARMED, "1")

    def _quarantine_culprits(self, verdict: Verdict) -> str:
        """Find who of the last batch is to blame, or of all, and take them out of the weights.
        Who is not to blame and yet too much is learned in the side memory."""
        row = self.store.artifacts.get_generation(self.store.artifacts.active_generation())
        older = (
            self.store.artifacts.get_generation(row.parent).fact_ids
            if row.parent is not None
            else ()
        )
        found = self._find_culprits(row.fact_ids, older) or self._find_culprits(row.fact_ids, ())
        if found is None:
            return "nothing to revert"
        self.quarantine.quarantine_facts(found.culprits, found.surplus, "; ".join(verdict.reasons))
        moved = f"moved {len(found.surplus)} to the side memory"
        return f"quarantined {len(found.culprits)} facts, {moved}"

    def _find_culprits(
        self, ids: Sequence[str], older: Sequence[str]
    ) -> Culprits[StoredFact] | None:
        """Who of the facts in the weights, without the older ones, makes them sick."""
        beside = [n for n in ids if n in older]
        suspects = [f for n in ids if n not in older and (f := self.store.find_fact(n))]

        def ids_with(some: Sequence[StoredFact]) -> list[str]:
            return [*beside, *(f.id for f in some)]

        found = self.quarantine.find_culprits(suspects, ids_with)
        return found if found.culprits or found.surplus else None


@contextmanager
def _record_seconds(costs: dict[str, float], part: str) -> Iterator[None]:
    """Note how many seconds the block took."""
    began = time.monotonic()
    yield
    costs[part] = time.monotonic() - began
