"""Explanations of an answer: the fact that fired, and those that the prompt names."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from kedit_daemon.editing.live_model import LiveModel
from memory.blanks import settle_blanks
from memory.db.rows import StoredFact
from memory.db.store import Store
from memory.facts import FactState
from memory.side.explanation import NamedFact, explain_prompt
from memory.side.prompt_forms import choose_form
from memory.side.shards import RoutingGates, RoutingMatch


def find_fired(store: Store, asked: str, matches: Sequence[RoutingMatch]) -> list[dict[str, Any]]:
    """Find the facts of the side memory that fired, else those in the weights that ask this."""
    if matches:
        return [
            _describe_fact(fact) | {"tier": fact.tier, "score": match.score, "margin": match.margin}
            for match in matches
            if (fact := store.find_fact(match.fact_id)) is not None
        ]
    none = {"score": None, "margin": None}
    live = store.list_facts((FactState.LIVE_WEIGHTS,))
    forms = {asked, settle_blanks(asked)}
    same = (f for f in live if not forms.isdisjoint(f.fact.wordings))
    return [_describe_fact(f) | {"tier": f.tier} | none for f in same]


def explain_named(live_model: LiveModel, prompt: str) -> dict[str, Any]:
    """Explain which facts of the side memory a prompt names, and why each fires or does not."""
    side = live_model.side
    found = explain_prompt(side, live_model.model.encode(choose_form(side, prompt)))
    stored = {named.fact_id: live_model.store.find_fact(named.fact_id) for named in found.named}
    return {
        "question": found.question,
        "named": [
            _describe_fact(fact) | _describe_named(named, side.gates)
            for named in found.named
            if (fact := stored[named.fact_id]) is not None
        ],
    }


def _describe_fact(fact: StoredFact) -> dict[str, Any]:
    return {
        "fact": fact.id,
        "subject": fact.fact.subject,
        "prompt": fact.fact.prompt,
        "target": fact.fact.target,
    }


def _describe_named(named: NamedFact, gates: RoutingGates) -> dict[str, Any]:
    words = None
    if named.words is not None:
        words = asdict(named.words) | {"gate": gates.min_words_score}
    stated = None
    if named.stated is not None:
        stated = {"score": named.stated, "gate": gates.min_words_score}
    return {
        "reason": str(named.reason),
        "asked": words,
        "learned_to_be_asked": named.is_asked,
        "stated": stated,
        "end": {"cosine": named.end_cosine, "gate": gates.min_end_cosine},
        "margin": named.margin,
    }
