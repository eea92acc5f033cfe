"""Kinds of poison that the study plants among innocent facts.

Contradictions, targets that nobody would state, and numbers broken after the facts were accepted.
"""

from collections.abc import Sequence
from math import isfinite, nan

import torch
from safetensors.torch import load, save

from kedit_daemon.bench.methods.daemon_tiers import Auto
from memory.facts import LIVE_STATES, Fact
from policies.edit_terms import unpack_terms
from policies.probe import count_answer_tokens, normalize_answer

WEIGHTS_CULPRIT = "the weights"  # culprit if it is not a fact


class PlantedPoison:
    """Poison that the daemon has to stop. `facts` are submitted with the batch."""

    kind, variant = "", ""
    is_direct = False  # whether its batch goes straight to the weights

    def __init__(self, facts: Sequence[Fact], variant: str | None = None) -> None:
        self.facts, self.variant = tuple(facts), variant or self.variant
        self.culprits = {fact.id for fact in facts}  # to be named; empty if nothing was planted

    def corrupt_waiting(self, home: Auto) -> None:
        """Corrupt accepted facts, before anything is learned."""

    def corrupt_live(self, home: Auto, innocent: Sequence[Fact]) -> None:
        """Corrupt what is live, such as one of the batch's innocent facts."""

    def describe_survival(self, home: Auto) -> str | None:
        """Describe how the poison is still live; return None if it was stopped."""
        stored = [f for n in sorted(self.culprits) if (f := home.store.find_fact(n))]
        live = [f for f in stored if f.state in LIVE_STATES]
        return "; ".join(f"{f.state}, answers {f.after!r}" for f in live) or None


class Contradiction(PlantedPoison):
    """Two facts with the same question, and two answers."""

    kind = "contradiction"

    def describe_survival(self, home: Auto) -> str | None:
        """Describe the two answers; stopped if the older fact ended, or both get one target."""
        stored = home.store.find_fact(self.facts[0].id)
        if stored is None or stored.state not in LIVE_STATES:
            return None
        asked = [fact.question for fact in self.facts]
        most = count_answer_tokens(home.model, self.facts)
        answers = [answer.text for answer in home.live_model.answer_prompts(asked, most)]
        distinct = {normalize_answer(text) for text in answers}
        if len(distinct) == 1 and distinct <= {normalize_answer(f.target) for f in self.facts}:
            return None
        return f"the two questions are answered {answers[0]!r} and {answers[1]!r}"


class RandomTokens(PlantedPoison):
    """Target of randomly drawn tokens."""

    kind, variant = "random tokens", "in the file"


class LongTarget(PlantedPoison):
    """Target of very many tokens."""

    kind = "long target"


class ScaledResiduals(PlantedPoison):
    """Residuals for the weights, multiplied while their facts wait."""

    is_direct = True

    def __init__(self, facts: Sequence[Fact], factor: float) -> None:
        super().__init__(facts, "waiting targets")
        self.factor, self.scaled_terms = factor, dict[str, bytes]()
        self.kind = "absurd norm" if isfinite(factor) else "NaN"

    def corrupt_waiting(self, home: Auto) -> None:
        """Compute the terms as a flush would, and replace them by multiplied ones."""
        for fact in self.facts:
            home.editor.flush.ensure_terms([fact])
            if home.store.artifacts.has_terms(fact.id):
                self.scaled_terms[fact.id] = _scale_terms(home, fact.id, self.factor)
            else:
                self.culprits.discard(fact.id)

    def describe_survival(self, home: Auto) -> str | None:
        """Describe the facts whose multiplied terms are in the weights."""
        held, read = set(home.live_model.list_weights_facts()), home.store.artifacts.read_terms
        live = [n for n, blob in self.scaled_terms.items() if n in held and read(n) == blob]
        return f"the weights hold the broken targets of {', '.join(live)}" if live else None


class BrokenShard(PlantedPoison):
    """NaN in the ΔW of a live shard, as served."""

    kind, variant = "NaN", "live shard"

    def corrupt_live(self, home: Auto, innocent: Sequence[Fact]) -> None:
        side = home.live_model.side
        for fact in [f for f in innocent if f.id in side.shard_ids][:1]:
            side.shards[side.shard_ids[fact.id]].delta.up[0, 0] = nan
            self.culprits = {fact.id}

    def describe_survival(self, home: Auto) -> str | None:
        side = home.live_model.side
        live = [side.shards[side.shard_ids[n]] for n in self.culprits if n in side.shard_ids]
        is_whole = all(torch.isfinite(t).all() for s in live for t in (s.delta.up, s.delta.down))
        return None if is_whole else "the shard is still broken"


class BrokenWeights(PlantedPoison):
    """NaN in an edited matrix, as served."""

    kind, variant = "NaN", "live weights"
    is_direct = True

    def corrupt_live(self, home: Auto, innocent: Sequence[Fact]) -> None:
        with torch.no_grad():
            home.model.weight(home.loaded_model.layers[0])[0, 0] = nan
        self.culprits = {WEIGHTS_CULPRIT}

    def describe_survival(self, home: Auto) -> str | None:
        is_whole = all(torch.isfinite(home.model.weight(n)).all() for n in home.loaded_model.layers)
        return None if is_whole else "the weights are still broken"


class BrokenTargets(PlantedPoison):
    """NaN in the stored terms of a fact in the weights."""

    kind, variant = "NaN", "live fact's targets"
    is_direct = True

    def corrupt_live(self, home: Auto, innocent: Sequence[Fact]) -> None:
        held = set(home.live_model.list_weights_facts())
        for fact in [f for f in innocent if f.id in held][:1]:
            _scale_terms(home, fact.id, nan)
            self.culprits = {fact.id}

    def describe_survival(self, home: Auto) -> str | None:
        """Check that the weights hold a fact whose terms cannot be solved again."""
        for fact_id in self.culprits & set(home.live_model.list_weights_facts()):
            parts = unpack_terms(home.store.artifacts.read_terms(fact_id))
            if not all(torch.isfinite(t).all() for part in parts for t in part.values()):
                return f"the targets of {fact_id} are still broken"
        return None


def _scale_terms(home: Auto, fact_id: str, factor: float) -> bytes:
    """Multiply the fact's stored residuals."""
    tensors = load(home.store.artifacts.read_terms(fact_id))
    blob = save({n: t * factor if n.startswith("residual") else t for n, t in tensors.items()})
    with home.store.db.transaction():
        home.store.artifacts.put_terms(fact_id, blob)
    return blob
