"""Retention: ask live facts again, and relearn those that are not stated any more."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kedit_daemon.editing.generations import Generations
from kedit_daemon.editing.live_model import LiveModel
from memory.db import meta_keys
from memory.db.rows import StoredFact
from memory.db.store import Store
from memory.facts import LIVE_STATES, FactState
from policies.probe import is_right_answer

OLDEST_COUNT = 50  # live facts that are asked again at every audit
ROTATING_COUNT = 100  # more of them, of those in the weights
SAMPLE_SIZE = 200  # of all live facts, in a probe of retention


@dataclass(frozen=True)
class RetentionResult:
    """Share of some live facts that are stated, None if there are no facts, and the others."""

    stated_share: float | None
    lost_facts: list[StoredFact]


class Retention:
    """Checks that the model still states the facts that it has learned."""

    def __init__(self, live_model: LiveModel, store: Store, generations: Generations) -> None:
        self.live_model, self.store, self.generations = live_model, store, generations

    def probe_retention(self) -> dict[str, Any]:
        """Ask the oldest live facts and a sample of all, record the result, relearn what is
        lost."""
        number = int(self.store.db.get_meta(meta_keys.RETENTION_PROBES) or "0") + 1
        live = self.store.list_facts(LIVE_STATES)
        sample = self._ask_facts(random.Random(number).sample(live, min(SAMPLE_SIZE, len(live))))
        oldest = self.ask_oldest()
        figures = {"oldest": oldest.stated_share, "sample": sample.stated_share}
        lost = list({f.id: f for f in (*oldest.lost_facts, *sample.lost_facts)}.values())
        with self.store.db.transaction():
            self.store.db.set_meta(meta_keys.RETENTION_PROBES, str(number))
            self.store.db.write_event("retention", figures=figures, lost=[f.id for f in lost])
        return {"figures": figures, "learned_anew": self.relearn_facts(lost)}

    def ask_oldest(self) -> RetentionResult:
        """Ask the oldest live facts."""
        return self._ask_facts(self.store.list_facts(LIVE_STATES)[:OLDEST_COUNT])

    def ask_rotating(self, turn: int) -> RetentionResult:
        """Ask others in the weights, the next ones in each turn: any solve may spoil those."""
        oldest = {fact.id for fact in self.store.list_facts(LIVE_STATES)[:OLDEST_COUNT]}
        others = [f for f in self.store.list_facts((FactState.LIVE_WEIGHTS,)) if f.id not in oldest]
        first = turn * ROTATING_COUNT % max(len(others), 1)
        return self._ask_facts([*others[first:], *others[:first]][:ROTATING_COUNT])

    def _ask_facts(self, facts: Sequence[StoredFact]) -> RetentionResult:
        if not facts:
            return RetentionResult(None, [])
        side = self.live_model.side
        # A shard that a fact in the weights keeps for chats would hide that they have lost it.
        side.hidden_facts = {f.id for f in facts if f.state is FactState.LIVE_WEIGHTS}
        try:
            answers = self.live_model.answer_questions([f.fact for f in facts])
        finally:
            side.hidden_facts = set()
        pairs = zip(answers, facts, strict=True)
        lost = [f for answer, f in pairs if not is_right_answer(answer.text, f.fact)]
        return RetentionResult(1 - len(lost) / len(facts), lost)

    def relearn_facts(self, lost: Sequence[StoredFact]) -> list[str]:
        """Relearn facts that are still live, in the side memory. Return their ids."""
        current = [f for one in lost if (f := self.store.find_fact(one.id))]
        live = [f for f in current if f.state in LIVE_STATES]
        if live:
            self.generations.move_to_side(live, "an audit found that it is not stated any more")
        return [f.id for f in live]
