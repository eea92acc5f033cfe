"""Retention: live facts are asked again, and what is not stated any more is learned anew."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kedit_daemon.editing.generations import Weights
from memory.db.rows import StoredFact
from memory.facts import LIVE, State
from policies.probe import longest_target, same

OLDEST = 50  # live facts that are asked again at every audit
IN_TURN = 100  # more of them, of those in the weights
SAMPLE = 200  # of all live facts, in a probe of retention
PROBES = "retention_probes"  # in the store's meta, how many there were: it draws the sample


@dataclass(frozen=True)
class Asked:
    """Share of some live facts that are still stated, if there are any, and the others."""

    share: float | None
    lost: list[StoredFact]


class Retention:
    """Asks the model that is served for what it has been told."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.served, self.store = weights, weights.served, weights.store

    def probe(self) -> dict[str, Any]:
        """Ask the oldest live facts, and a sample of all, and write down what came of it."""
        number = int(self.store.meta(PROBES) or "0") + 1
        live = self.store.facts(LIVE)
        sample = self._ask(random.Random(number).sample(live, min(SAMPLE, len(live))))
        oldest = self.oldest()
        figures = {"oldest": oldest.share, "sample": sample.share}
        lost = list({f.id: f for f in (*oldest.lost, *sample.lost)}.values())
        with self.store.transaction():
            self.store.set_meta(PROBES, str(number))
            self.store.event("retention", figures=figures, lost=[f.id for f in lost])
        return {"figures": figures, "learned_anew": self.learn_anew(lost)}

    def oldest(self) -> Asked:
        """Ask the oldest live facts."""
        return self._ask(self.store.facts(LIVE)[:OLDEST])

    def in_turn(self, turn: int) -> Asked:
        """Ask others that are in the weights, where any solve may spoil what was there: at each
        turn the next ones."""
        oldest = {fact.id for fact in self.store.facts(LIVE)[:OLDEST]}
        others = [f for f in self.store.facts((State.LIVE_WEIGHTS,)) if f.id not in oldest]
        first = turn * IN_TURN % max(len(others), 1)
        return self._ask([*others[first:], *others[:first]][:IN_TURN])

    def _ask(self, facts: Sequence[StoredFact]) -> Asked:
        if not facts:
            return Asked(None, [])
        longest = longest_target(self.served.model, [f.fact for f in facts])
        said = self.served.ask([f.fact.question for f in facts], longest)
        pairs = zip(said, facts, strict=True)
        lost = [f for answer, f in pairs if not same(answer.text, f.fact.target)]
        return Asked(1 - len(lost) / len(facts), lost)

    def learn_anew(self, lost: Sequence[StoredFact]) -> list[str]:
        """Let those that are still live be learned again, in the side memory; their ids."""
        live = [f for n in lost if (f := self.store.fact(n.id)) and f.state in LIVE]
        if live:
            self.weights.send_beside(live, "an audit found that it is not stated any more")
        return [f.id for f in live]
