"""What is planted among innocent facts: files that contradict themselves, targets that no person
would state, and numbers that are broken after the door has let the facts in."""

from collections.abc import Sequence
from math import isfinite, nan

import torch
from safetensors.torch import load, save

from kedit_daemon.bench.tiers import Auto
from memory.facts import LIVE, Fact
from policies.memit_mass import unpack
from policies.probe import normalised

WEIGHTS = "the weights"  # who is guilty where it is no fact


class Plant:
    """Something that has to be stopped. `facts` are handed in with the batch."""

    kind, way = "", ""
    direct = False  # whether its batch goes straight to the weights

    def __init__(self, facts: Sequence[Fact]) -> None:
        self.facts = tuple(facts)
        self.guilty = {fact.id for fact in facts}  # who is to be named; nobody: it was not planted

    def waiting(self, home: Auto) -> None:
        """Do harm to what the door has let in, before anything is learned."""

    def settled(self, home: Auto, innocent: Sequence[Fact]) -> None:
        """Do harm to what is live, of the batch's innocent facts if it is to be one of these."""

    def alive(self, home: Auto) -> str | None:
        """How the poison is still there, in words; None where it was stopped."""
        live = [f for n in sorted(self.guilty) if (f := home.store.fact(n)) and f.state in LIVE]
        return "; ".join(f"{f.state}, answers {f.after!r}" for f in live) or None


class Contradiction(Plant):
    """Two facts that ask the same, with two answers."""

    kind = "contradiction"

    def __init__(self, facts: Sequence[Fact], way: str) -> None:
        super().__init__(facts)
        self.way = way

    def alive(self, home: Auto) -> str | None:
        """Stopped, where the older is live no more, or both questions get one of the targets."""
        stored = home.store.fact(self.facts[0].id)
        if stored is None or stored.state not in LIVE:
            return None
        asked = [fact.question for fact in self.facts]
        most = max(len(home.model.encode_target(f.question, f.target)) for f in self.facts)
        said = [answer.text for answer in home.served.ask(asked, most + 4)]
        agreed = {normalised(text) for text in said}
        if len(agreed) == 1 and agreed <= {normalised(f.target) for f in self.facts}:
            return None
        return f"the two questions are answered {said[0]!r} and {said[1]!r}"


class RandomTokens(Plant):
    """A target of tokens that were drawn blindly."""

    kind, way = "random tokens", "in the file"


class LongTarget(Plant):
    """A target of very many tokens."""

    kind = "long target"

    def __init__(self, facts: Sequence[Fact], way: str) -> None:
        super().__init__(facts)
        self.way = way


class Residuals(Plant):
    """Targets for the weights that are multiplied while their fact waits."""

    direct = True

    def __init__(self, facts: Sequence[Fact], factor: float) -> None:
        super().__init__(facts)
        self.factor, self.blobs = factor, dict[str, bytes]()
        self.kind, self.way = "absurd norm" if isfinite(factor) else "NaN", "waiting targets"

    def waiting(self, home: Auto) -> None:
        """Compute the targets as a flush would, and lay the multiplied ones in their place."""
        for fact in self.facts:
            home.editor.flush.compute([fact])
            if home.store.has_terms(fact.id):
                self.blobs[fact.id] = _multiplied(home, fact.id, self.factor)
            else:
                self.guilty.discard(fact.id)

    def alive(self, home: Auto) -> str | None:
        """Whether the weights hold the multiplied targets."""
        held = set(home.served.weights_facts())
        found = [n for n, b in self.blobs.items() if n in held and home.store.terms(n) == b]
        return f"the weights hold the broken targets of {', '.join(found)}" if found else None


class BrokenShard(Plant):
    """A number in the ΔW of a live shard, as served."""

    kind, way = "NaN", "live shard"

    def settled(self, home: Auto, innocent: Sequence[Fact]) -> None:
        """Break a shard of the batch."""
        side = home.served.side
        for fact in [f for f in innocent if f.id in side.shard_of][:1]:
            side.shards[side.shard_of[fact.id]].delta.up[0, 0] = nan
            self.guilty = {fact.id}

    def alive(self, home: Auto) -> str | None:
        """Whether the shard is still broken."""
        side = home.served.side
        deltas = [side.shards[side.shard_of[n]].delta for n in self.guilty if n in side.shard_of]
        whole = all(torch.isfinite(t).all() for d in deltas for t in (d.up, d.down))
        return None if whole else "the shard is still broken"


class BrokenWeights(Plant):
    """A number in an edited matrix, as served."""

    kind, way = "NaN", "live weights"
    direct = True

    def settled(self, home: Auto, innocent: Sequence[Fact]) -> None:
        """Break the first edited layer."""
        with torch.no_grad():
            home.model.weight(home.loaded.layers[0])[0, 0] = nan
        self.guilty = {WEIGHTS}

    def alive(self, home: Auto) -> str | None:
        """Whether an edited matrix is still broken."""
        whole = all(torch.isfinite(home.model.weight(n)).all() for n in home.loaded.layers)
        return None if whole else "the weights are still broken"


class BrokenTargets(Plant):
    """The stored targets of a fact that the weights hold."""

    kind, way = "NaN", "live fact's targets"
    direct = True

    def settled(self, home: Auto, innocent: Sequence[Fact]) -> None:
        """Break those of a fact of the batch."""
        held = set(home.served.weights_facts())
        for fact in [f for f in innocent if f.id in held][:1]:
            _multiplied(home, fact.id, nan)
            self.guilty = {fact.id}

    def alive(self, home: Auto) -> str | None:
        """Whether the weights hold a fact that cannot be solved for again."""
        for fact_id in self.guilty & set(home.served.weights_facts()):
            parts = unpack(home.store.terms(fact_id))
            if not all(torch.isfinite(t).all() for part in parts for t in part.values()):
                return f"the targets of {fact_id} are still broken"
        return None


def _multiplied(home: Auto, fact_id: str, factor: float) -> bytes:
    """The fact's stored targets, multiplied there."""
    tensors = load(home.store.terms(fact_id))
    blob = save({n: t * factor if n.startswith("residual") else t for n, t in tensors.items()})
    with home.store.transaction():
        home.store.put_terms(fact_id, blob)
    return blob
