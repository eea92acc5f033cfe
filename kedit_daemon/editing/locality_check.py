"""Locality: whether what the edits in the weights are not about is still answered as before.

The statements of the canary are about other subjects. An edit changes first what a chat model says
about its own subject, and about neighbours, so these are asked in a chat too.
"""

from dataclasses import dataclass
from typing import Any

from kedit_daemon.editing.live_model import LiveModel
from kedit_daemon.editing.relations import load_relation_index
from memory.db.rows import StoredFact
from memory.db.store import Store
from memory.facts import Fact, FactState
from memory.model.chat_layout import find_chat_layout, render_chat
from policies.asking.asked_rows import make_question

FACTS_ASKED = 8  # in the weights, the next ones at each audit
OTHERS_PER_FACT, NEIGHBOURS_PER_FACT = 2, 1
REPLY_TOKENS = 12  # that are compared


@dataclass(frozen=True)
class LocalityReading:
    """Share of some replies about edited subjects and neighbours that are as before the edits."""

    asked: int
    as_before: float

    def as_dict(self) -> dict[str, Any]:
        """Return the reading as JSON-ready values."""
        return {"asked": self.asked, "as_before": self.as_before}


class LocalityCheck:
    """Asks the served model, and the unedited one, what the edits are not about."""

    def __init__(self, live_model: LiveModel, store: Store) -> None:
        self.live_model, self.store = live_model, store

    def ask(self, turn: int) -> LocalityReading | None:
        """Ask about the facts whose turn it is; None where nothing is asked.

        Questions for which another fact of the side memory fires are left out: their answers
        changed because they should.
        """
        pairs = [(f.id, q) for f in self._select_facts(turn) for q in self._write_prompts(f.fact)]
        prompts = [prompt for _, prompt in pairs]
        after = self.live_model.answer_prompts(prompts, REPLY_TOKENS, whole=True)
        before = self.live_model.answer_base(prompts, REPLY_TOKENS, whole=True)
        kept = [
            answer.text == base
            for (fact_id, _), answer, base in zip(pairs, after, before, strict=True)
            if all(match.fact_id == fact_id for match in answer.matches)
        ]
        return LocalityReading(len(kept), sum(kept) / len(kept)) if kept else None

    def _select_facts(self, turn: int) -> list[StoredFact]:
        facts = self.store.list_facts((FactState.LIVE_WEIGHTS,))
        first = turn * FACTS_ASKED % max(len(facts), 1)
        return [*facts[first:], *facts[:first]][:FACTS_ASKED]

    def _write_prompts(self, fact: Fact) -> list[str]:
        """Write the questions about a fact that fit the model, as turns of a chat where it has
        one."""
        near = [make_question(n.prompt) for n in fact.neighbours[:NEIGHBOURS_PER_FACT]]
        found = [*load_relation_index().find_other_questions(fact, OTHERS_PER_FACT), *near]
        tokenizer = self.live_model.model.tokenizer
        if find_chat_layout(tokenizer) is not None:
            turns = [{"role": "user", "content": question} for question in found]
            found = [render_chat(tokenizer, [turn]) for turn in turns]
        most = self.live_model.model.max_positions - REPLY_TOKENS
        return [p for p in found if len(self.live_model.model.encode(p)) <= most]
