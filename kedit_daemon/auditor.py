"""The audit: what is served is measured, judged and written down, and the verdict carried out."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kedit_daemon.config import Config
from kedit_daemon.weights import Weights
from memory.errors import KeditError
from memory.evidence import Examiner
from memory.facts import LIVE, State
from memory.ledger import read_head, verify
from policies.probe import longest_target, same
from policies.site import EditSite
from policies.stability import Action, Limits, Thresholds, Verdict

RETAINED = 20  # of the oldest live facts, asked again at every audit


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

    def __init__(self, weights: Weights) -> None:
        self.weights, self.served, self.store = weights, weights.served, weights.store
        self.examiner = Examiner(self.served.loaded.canary)

    def audit(self) -> dict[str, Any]:
        """Measure, judge, write it down, and do what the verdict says."""
        began = time.monotonic()
        figures, verdict = self._figures()
        seconds = time.monotonic() - began
        generation = self.store.active_generation()
        with self.store.transaction():
            number = self.store.add_audit(
                generation, str(verdict.action), figures, verdict.reasons, seconds
            )
        return {
            "audit": number,
            "verdict": str(verdict.action),
            "reasons": list(verdict.reasons),
            "figures": figures,
            "seconds": seconds,
            "generation": generation,
            "acted": self._act(verdict.action, "; ".join(verdict.reasons)),
        }

    def _figures(self) -> tuple[dict[str, Any], Verdict]:
        """What an audit writes down, with what each part of it took in seconds; and the verdict."""
        costs: dict[str, float] = {}
        with _timed(costs, "measure"):
            health, verdict = self.weights.measured()
            seen = self.served.loaded.canary.seen
        figures: dict[str, Any] = health.as_dict()
        with _timed(costs, "retention"):
            figures["retention"] = self._retention()
        with _timed(costs, "hash"):
            weights = self.served.model.weights_hash(self.served.loaded.layers)
        figures["weights_as_written"] = self._as_written(weights)
        with _timed(costs, "chain"):
            chain = verify(self.store.conn, read_head(self.served.home.head))
        figures["chain_intact"] = chain.intact
        with _timed(costs, "evidence"):
            evidence = self.examiner.take(len(self.served.weights_facts()), weights, seen)
        figures["evidence"] = evidence.as_dict()
        return {**figures, "costs": costs}, verdict

    def _retention(self) -> float | None:
        """Share of the oldest live facts that the model still states."""
        oldest = [f.fact for f in self.store.facts(LIVE)[:RETAINED]]
        if not oldest:
            return None
        said = self.served.ask(
            [f.question for f in oldest], longest_target(self.served.model, oldest)
        )
        right = [same(a.text, f.target) for a, f in zip(said, oldest, strict=True)]
        return sum(right) / len(right)

    def _as_written(self, weights: str) -> bool:
        """Whether the weights in memory, by their hash, are those that were published."""
        row = self.store.generation(self.store.active_generation())
        return row.sha256 is None or row.weights_hash == weights

    def _act(self, action: Action, reasons: str) -> str:
        if action is Action.REVERT:
            return self._quarantine(reasons)
        if action is Action.CONSOLIDATE:
            done = self.weights.consolidate(dry_run=False)
            return "consolidated" if done["changed"] else "already the joint solve"
        return "nothing"

    def _quarantine(self, reasons: str) -> str:
        """Take the last batch out of the weights; there may be nothing to take."""
        row = self.store.generation(self.store.active_generation())
        before = self.store.generation(row.parent).fact_ids if row.parent is not None else ()
        last = [f for n in row.fact_ids if n not in before and (f := self.store.fact(n))]
        if not last:
            return "nothing to revert"
        self.weights.take_out(last, State.REVERTED, f"quarantined by an audit: {reasons}")
        return f"reverted {len(last)} facts of generation {row.id}"


@contextmanager
def _timed(costs: dict[str, float], part: str) -> Iterator[None]:
    """Note how many seconds the block took."""
    began = time.monotonic()
    yield
    costs[part] = time.monotonic() - began
