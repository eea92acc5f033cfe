"""What is planted among innocent facts: files that contradict themselves, targets that no person
would state, and numbers that are broken after the door has let the facts in."""

from collections.abc import Sequence
from math import isfinite, nan

import torch
from safetensors.torch import load, save

from kedit_daemon.bench.tiers import Auto
from memory.facts import LIVE_STATES, Fact
from policies.memit_mass import unpack_terms
from policies.probe import normalize_answer
from policies.edit_terms import unpack_terms
from policies.probe import normalise_answer

WEIGHTS_CULPRIT = "the weights"  # who is guilty where it is no fact


class PlantedPoison:
    """Something that has to be stopped. `facts` are handed in with the batch."""

    kind, variant = "", ""
    is_direct = False  # whether its batch goes straight to the weights

    def __init__(self, facts: Sequence[Fact]) -> None:
        self.facts = tuple(facts)
        self.culprits = {
            fact.id for fact in facts
        }  # who is to be named; nobody: it was not planted

    def corrupt_waiting(self, home: Auto) -> None:
        """Do harm to what the door has let in, before anything is learned."""

    def corrupt_live(self, home: Auto, innocent: Sequence[Fact]) -> None:
        """Do harm to what is live, of the batch's innocent facts if it is to be one of these."""

    def describe_survival(self, home: Auto) -> str | None:
        """How the poison is still there, in words; None where it was stopped."""
        live = [
            f
            for n in sorted(self.culprits)
            if (f := home.store.find_fact(n)) and f.state in LIVE_STATES
        ]
        return "; ".join(f"{f.state}, answers {f.after!r}" for f in live) or None


class Contradiction(PlantedPoison):
    """Two facts that ask the same, with two answers."""

    kind = "contradiction"

    def __init__(self, facts: Sequence[Fact], way: str) -> None:
        super().__init__(facts)
        self.variant = way

    def describe_survival(self, home: Auto) -> str | None:
        """Stopped, where the older is live no more, or both questions get one of the targets."""
        stored = home.store.find_fact(self.facts[0].id)
        if stored is None or stored.state not in LIVE_STATES:
            return None
        asked = [fact.question for fact in self.facts]
        most = max(len(home.model.encode_target(f.question, f.target)) for f in self.facts)
        said = [answer.text for answer in home.live_model.answer_prompts(asked, most + 4)]
        agreed = {normalize_answer(text) for text in said}
        if len(agreed) == 1 and agreed <= {normalize_answer(f.target) for f in self.facts}:
            return None
        return f"the two questions are answered {said[0]!r} and {said[1]!r}"


class RandomTokens(PlantedPoison):
    """A target of tokens that were drawn blindly."""

    kind, variant = "random tokens", "in the file"


class LongTarget(PlantedPoison):
    """A target of very many tokens."""

    kind = "long target"

    def __init__(self, facts: Sequence[Fact], way: str) -> None:
        super().__init__(facts)
        self.variant = way


class ScaledResiduals(PlantedPoison):
    """Targets for the weights that are multiplied while their fact waits."""

    is_direct = True

    def __init__(self, facts: Sequence[Fact], factor: float) -> None:
        super().__init__(facts)
        self.factor, self.scaled_terms = factor, dict[str, bytes]()
        self.kind, self.variant = "absurd norm" if isfinite(factor) else "NaN", "waiting targets"

    def corrupt_waiting(self, home: Auto) -> None:
        """Compute the targets as a flush would, and lay the multiplied ones in their place."""
        for fact in self.facts:
            home.editor.flush.ensure_terms([fact])
            if home.store.artifacts.has_terms(fact.id):
                self.scaled_terms[fact.id] = _scale_terms(home, fact.id, self.factor)
            else:
                self.culprits.discard(fact.id)

    def describe_survival(self, home: Auto) -> str | None:
        """Whether the weights hold the multiplied targets."""
        held = set(home.live_model.list_weights_facts())
        found = [
            n
            for n, b in self.scaled_terms.items()
            if n in held and home.store.artifacts.read_terms(n) == b
        ]
        return f"the weights hold the broken targets of {', '.join(found)}" if found else None


class BrokenShard(PlantedPoison):
    """A number in the ΔW of a live shard, as served."""

    kind, variant = "NaN", "live shard"

    def corrupt_live(self, home: Auto, innocent: Sequence[Fact]) -> None:
        """Break a shard of the batch."""
        side = home.live_model.side
        for fact in [f for f in innocent if f.id in side.shard_ids][:1]:
            side.shards[side.shard_ids[fact.id]].delta.up[0, 0] = nan
            self.culprits = {fact.id}

    def describe_survival(self, home: Auto) -> str | None:
        """Whether the shard is still broken."""
        side = home.live_model.side
        deltas = [
            side.shards[side.shard_ids[n]].delta for n in self.culprits if n in side.shard_ids
        ]
        whole = all(torch.isfinite(t).all() for d in deltas for t in (d.up, d.down))
        return None if whole else "the shard is still broken"


class BrokenWeights(PlantedPoison):
    """A number in an edited matrix, as served."""

    kind, variant = "NaN", "live weights"
    is_direct = True

    def corrupt_live(self, home: Auto, innocent: Sequence[Fact]) -> None:
        """Break the first edited layer."""
        with torch.no_grad():
            home.model.weight(home.loaded_model.layers[0])[0, 0] = nan
        self.culprits = {WEIGHTS_CULPRIT}

    def describe_survival(self, home: Auto) -> str | None:
        """Whether an edited matrix is still broken."""
        whole = all(torch.isfinite(home.model.weight(n)).all() for n in home.loaded_model.layers)
        return None if whole else "the weights are still broken"


class BrokenTargets(PlantedPoison):
    """The stored targets of a fact that the weights hold."""

    kind, variant = "NaN", "live fact's targets"
    is_direct = True

    def corrupt_live(self, home: Auto, innocent: Sequence[Fact]) -> None:
        """Break those of a fact of the batch."""
        held = set(home.live_model.list_weights_facts())
        for fact in [f for f in innocent if f.id in held][:1]:
            _scale_terms(home, fact.id, nan)
            self.culprits = {fact.id}

    def describe_survival(self, home: Auto) -> str | None:
        """Whether the weights hold a fact that cannot be solved for again."""
        for fact_id in self.culprits & set(home.live_model.list_weights_facts()):
            parts = unpack_terms(home.store.artifacts.read_terms(fact_id))
            if not all(torch.isfinite(t).all() for part in parts for t in part.values()):
                return f"the targets of {fact_id} are still broken"
        return None


def _scale_terms(home: Auto, fact_id: str, factor: float) -> bytes:
    """The fact's stored targets, multiplied there."""
    tensors = load(home.store.artifacts.read_terms(fact_id))
    blob = save({n: t * factor if n.startswith("residual") else t for n, t in tensors.items()})
    with home.store.db.transaction():
        home.store.artifacts.put_terms(fact_id, blob)
    return blob
