"""The audit: what is served is measured, judged and written down, and the verdict carried out."""

import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kedit_daemon.config import Config
from kedit_daemon.flush import Flush
from kedit_daemon.mending import as_written, damage, mend
from memory.errors import KeditError
from memory.facts import LIVE, State
from memory.health import Health
from memory.ledger import canonical, read_head, verify
from memory.rows import StoredFact
from policies.guilt import Guilt
from policies.probe import longest_target, same
from policies.routing import wants_batch
from policies.site import EditSite
from policies.stability import Action, Limits, Thresholds, Verdict, judge
from policies.steadiness import Acted, Restraint, held_back

OLDEST = 50  # live facts that are asked again at every audit
SAMPLE = 200  # of all live facts, in a probe of retention
ACTS = "audit_acts"  # in the store's meta: [when, what], the newest last
DISARMED = "audit_disarmed"  # while the weights have not been clearly well since a consolidation
PROBES = "retention_probes"  # how many there were: the number draws the sample


@dataclass(frozen=True)
class Retention:
    """Share of some live facts that are still stated, if there are any, and the others."""

    share: float | None
    lost: list[StoredFact]


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

    def audit(self, dry_run: bool = False) -> dict[str, Any]:
        """Mend what is damaged in memory, measure, judge, write it down, and do what the verdict
        says. A dry run measures and judges what is there."""
        began = time.monotonic()
        found = damage(self.served)
        if found and not dry_run:
            mend(self.flush, found)
        health, retention = self.weights.measured()[0], self._retention(OLDEST)
        verdict = judge(health, self.weights.thresholds, retention.share)
        figures: dict[str, Any] = health.as_dict()
        figures |= {"retention": retention.share, "weights_as_written": as_written(self.served)}
        chain = verify(self.store.conn, read_head(self.served.home.head))
        figures["chain_intact"] = chain.intact
        reasons, action = [*found, *verdict.reasons], str(verdict.action)
        result: dict[str, Any] = {
            "verdict": action,
            "reasons": reasons,
            "figures": figures,
            "generation": self.store.active_generation(),
            "dry_run": dry_run,
        }
        seconds = time.monotonic() - began
        if dry_run:
            held = self._held_back(verdict.action, health)
            return result | {"seconds": seconds, "would": held or action}
        with self.store.transaction():
            number = self.store.add_audit(
                self.store.active_generation(), action, figures, reasons, seconds
            )
        acted = self._act(verdict, health)
        learned_anew = self._relearn(retention.lost)
        return result | {"audit": number, "seconds": seconds, "acted": acted} | learned_anew

    # Retention ----------------------------------------------------------------------------------

    def probe_retention(self) -> dict[str, Any]:
        """Ask the oldest live facts, and a sample of all, whether the model still states them."""
        number = int(self.store.meta(PROBES) or "0") + 1
        oldest, sample = self._retention(OLDEST), self._retention(SAMPLE, random.Random(number))
        figures = {"oldest": oldest.share, "sample": sample.share}
        lost = {f.id: f for f in (*oldest.lost, *sample.lost)}
        with self.store.transaction():
            self.store.set_meta(PROBES, str(number))
            self.store.event("retention", figures=figures, lost=sorted(lost))
        return {"figures": figures} | self._relearn(list(lost.values()))

    def _retention(self, most: int, chance: random.Random | None = None) -> Retention:
        """Of the oldest live facts, or of so many drawn by chance, those that are not stated."""
        live = self.store.facts(LIVE)
        some = live[:most] if chance is None else chance.sample(live, min(most, len(live)))
        if not some:
            return Retention(None, [])
        longest = longest_target(self.served.model, [f.fact for f in some])
        said = self.served.ask([f.fact.question for f in some], longest)
        pairs = zip(said, some, strict=True)
        lost = [f for answer, f in pairs if not same(answer.text, f.fact.target)]
        return Retention(1 - len(lost) / len(some), lost)

    def _relearn(self, lost: Sequence[StoredFact]) -> dict[str, Any]:
        """Let what is live and not stated be learned again, in the side memory."""
        live = [f for n in lost if (f := self.store.fact(n.id)) and f.state in LIVE]
        if not live:
            return {}
        why = "an audit found that it is not stated any more"
        self.weights.take_out(live, State.RECEIVED, why)
        self._send_beside(live)
        return {"learned_anew": [f.id for f in live]}

    def _send_beside(self, facts: Sequence[StoredFact]) -> None:
        with self.store.transaction():
            for fact in facts:
                now = self.store.fact(fact.id)
                if now is not None and wants_batch(now):
                    self.store.send_beside(fact.id, figure="audit")

    # What is done -------------------------------------------------------------------------------

    def _held_back(self, action: Action, health: Health) -> str | None:
        if not health.finite:
            return None
        armed = self.store.meta(DISARMED) is None
        return held_back(action, self._acts(), armed, self.store.now(), self.restraint)

    def _act(self, verdict: Verdict, health: Health) -> str:
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
        return [Acted(at, action) for at, action in json.loads(self.store.meta(ACTS) or "[]")]

    def _remember(self, action: Action) -> None:
        """Before it is done: what fails must not be tried again at once either."""
        acts = [[act.at, act.action] for act in self._acts()][1 - self.restraint.budget :]
        with self.store.transaction():
            self.store.set_meta(ACTS, canonical([*acts, [self.store.now(), str(action)]]))
            if action is Action.CONSOLIDATE:
                self.store.set_meta(DISARMED, "1")

    def _quarantine(self, verdict: Verdict) -> str:
        """Find who of the last batch is to blame, or of all, and take them out of the weights.
        Who is not to blame and yet too much is learned in the side memory."""
        row = self.store.generation(self.store.active_generation())
        older = self.store.generation(row.parent).fact_ids if row.parent is not None else ()
        found = self._to_blame(row.fact_ids, older) or self._to_blame(row.fact_ids, ())
        if found is None:
            return "nothing to revert"
        self.quarantine.lock_up(found.guilty)
        if found.crowd:
            self.weights.take_out(found.crowd, State.RECEIVED, "; ".join(verdict.reasons))
            self._send_beside(found.crowd)
        return f"quarantined {len(found.guilty)} facts, moved {len(found.crowd)} beside the weights"

    def _to_blame(self, ids: Sequence[str], older: Sequence[str]) -> Guilt[StoredFact] | None:
        """Who of the facts in the weights, without the older ones, makes them sick."""
        beside = [n for n in ids if n in older]
        suspects = [f for n in ids if n not in older and (f := self.store.fact(n))]

        def with_those(some: Sequence[StoredFact]) -> list[str]:
            return [*beside, *(f.id for f in some)]

        found = self.quarantine.search(suspects, with_those)
        return found if found.guilty or found.crowd else None
