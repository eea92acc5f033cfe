"""The side memory: deltas for one layer in shards, found by key, laid over the rows they concern.

A shard is a delta ΔW = B A of low rank for the down projection of the side layer, trained on a few
facts. A fact has two kinds of keys. Its *subject keys*, the key layer's outputs at the subject's
last token, are in the index and are looked for at every token of a prompt. Its *end keys*, the
side layer's outputs where its prompts end, tell what is asked of the subject. A fact fires for a
row when a subject key and an end key are near enough, the prompt names the subject, and the shard's
own activation distance d(a) = ‖ΔW a‖ (WISE, Wang et al. 2024, eq. 4) confirms it. (Keys alone mix
up subjects that end alike once there are thousands.) The decision is taken once for each row, at
the prompt's end, and holds for every token decoded after it. A row without a match is not touched:
its numbers are those of the weights, bit for bit.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from memory.errors import KeditError
from memory.index import KeyIndex
from memory.model import EditableModel
from memory.naming import Names

CANDIDATES = 16  # vectors looked at for each token; a fact has several
MOST_CANDIDATES = 2048  # FAISS on a GPU bears no more


def number_of(fact_id: str) -> int:
    """A fact's id, 12 hex digits, as the index wants it."""
    return int(fact_id, 16)


def fact_id_of(number: int) -> str:
    """The reverse of `number_of`."""
    return f"{number:012x}"


@dataclass(frozen=True)
class Delta:
    """ΔW = B A of low rank: `up` is B (hidden, rank), `down` is A (rank, width)."""

    up: Tensor
    down: Tensor

    def moved(self, inputs: Tensor) -> Tensor:
        """ΔW k (..., hidden) of inputs k (..., width): two small products, never ΔW itself."""
        return inputs @ self.down.T @ self.up.T


@dataclass(frozen=True)
class Shard:
    """ΔW of some facts, and the distance from which it may answer."""

    delta: Delta
    threshold: float


@dataclass(frozen=True)
class Keys:
    """A fact's retrieval keys, of unit length: subject (n, hidden) and end (m, hidden)."""

    subject: Tensor
    end: Tensor


@dataclass(frozen=True)
class Gates:
    """Where routing looks, and the least cosines that route; `unnamed` is that of a subject key
    where the prompt does not name the subject, of a fact that does not always name it either."""

    key_layer: int
    side_layer: int
    subject: float
    end: float
    unnamed: float


@dataclass(frozen=True)
class Match:
    """The fact that fires for a row: its shard, the cosine of its end key, and the activation
    distance over the shard's threshold."""

    fact_id: str
    shard: int
    score: float
    margin: float


class SideMemory:
    """Shards and keys of the facts that live beside the weights."""

    def __init__(self, model: EditableModel, gates: Gates, centres: Mapping[int, Tensor]) -> None:
        """`centres`, by layer, are taken from every key. Raises KeditError: one layer too few."""
        if gates.key_layer >= gates.side_layer:
            raise KeditError(
                f"the key layer {gates.key_layer} is not below the side layer {gates.side_layer}",
                code="unsupported",
                hint="a model needs at least two layers",
                exit_code=78,
            )
        self.model, self.gates, self.layer = model, gates, gates.side_layer
        self.centres = {n: centres[n].to(model.device) for n in (gates.key_layer, self.layer)}
        self.shards: dict[int, Shard] = {}
        self.shard_of: dict[str, int] = {}
        self.end_keys: dict[str, Tensor] = {}
        self.names = Names()
        self.unnamed: set[str] = set()  # facts that are meant also where they are not named
        self.hidden: set[str] = set()  # facts that do not fire for the time being
        self.index = KeyIndex(model.hidden, gpu=model.device.type == "cuda")

    def key(self, layer: int, outputs: Tensor) -> Tensor:
        """Retrieval keys (..., hidden) from a layer's outputs: centred, of unit length."""
        return torch.nn.functional.normalize(outputs.float() - self.centres[layer], dim=-1)

    def put(
        self,
        fact_id: str,
        shard: int,
        keys: Keys,
        subject: str,
        *,
        unnamed: bool,
        indexed: bool = False,
    ) -> None:
        """Make a fact findable. `unnamed`: whether one of its prompts does without its subject;
        `indexed`: its subject keys are in the index already."""
        if not indexed:
            self.drop(fact_id)
            self.index.add(number_of(fact_id), keys.subject)
        self.end_keys[fact_id] = keys.end.to(self.model.device)
        self.names.put(fact_id, subject)
        (self.unnamed.add if unnamed else self.unnamed.discard)(fact_id)
        self.shard_of[fact_id] = shard

    def drop(self, fact_id: str) -> None:
        """Make a fact unfindable, at once."""
        if self.shard_of.pop(fact_id, None) is not None:
            del self.end_keys[fact_id]
            self.names.drop(fact_id)
            self.unnamed.discard(fact_id)
            self.index.remove(number_of(fact_id))

    def candidates(self, ids: Tensor, outputs: Tensor) -> list[str]:
        """Facts whose subject stands in a prompt: its ids (tokens,), and the key layer's outputs
        (tokens, hidden) for them."""
        named = self.names.in_text(self.model.decode(ids.tolist()))
        if not named and not self.unnamed:
            return []  # most prompts are about no fact, and are not looked up at all
        # Keys of one subject may be equal to the bit: they must not crowd one another out.
        many = min(CANDIDATES + self.index.count(map(number_of, named)), MOST_CANDIDATES)
        hits = self.index.search(self.key(self.gates.key_layer, outputs), many)
        found = [(fact_id_of(h.number), h.score) for row in hits for h in row]
        return list(dict.fromkeys(n for n, score in found if score >= self._gate(n, n in named)))

    def _gate(self, fact_id: str, named: bool) -> float:
        if named:
            return self.gates.subject
        return self.gates.unnamed if fact_id in self.unnamed else torch.inf

    def asked(self, candidates: Sequence[str], outputs: Tensor) -> dict[str, float]:
        """How near each candidate's end keys are to what is asked: outputs (hidden,)."""
        asked = self.key(self.layer, outputs)
        return {n: float((self.end_keys[n] @ asked).max()) for n in candidates}

    def confirm(self, candidates: Sequence[str], inputs: Tensor, outputs: Tensor) -> Match | None:
        """The candidate that is asked for, from the side layer where the prompt ends:
        inputs (width,), outputs (hidden,)."""
        scores = self.asked(candidates, outputs)
        for fact_id in sorted(scores, key=lambda n: -scores[n]):
            if scores[fact_id] < self.gates.end:
                return None
            shard = self.shards[self.shard_of[fact_id]]
            margin = float(shard.delta.moved(inputs).norm()) / shard.threshold
            if margin >= 1 and fact_id not in self.hidden:
                return Match(fact_id, self.shard_of[fact_id], scores[fact_id], margin)
        return None

    @contextmanager
    def overlay(self, fired: list[Match | None]) -> Iterator[None]:
        """Route the rows of one batch: decided in its first pass, kept for all that follow.

        `fired` is filled with the decision for each row. Rows must end at their last column.
        """
        fired.clear()
        found: list[list[str]] = []
        heard: list[Tensor] = []

        def look(_inputs: Tensor, outputs: Tensor) -> None:
            if not fired:
                rows = zip(heard[0], outputs, strict=True)
                found[:] = [self.candidates(*row) if self.shard_of else [] for row in rows]

        def lay(inputs: Tensor, outputs: Tensor) -> Tensor | None:
            if not fired:
                ends = zip(found, inputs[:, -1], outputs[:, -1], strict=True)
                fired.extend(self.confirm(names, k, y) if names else None for names, k, y in ends)
            routed = [(n, match) for n, match in enumerate(fired) if match]
            if not routed:
                return None
            changed = outputs.clone()
            for n, match in routed:
                changed[n, -1] += self.shards[match.shard].delta.moved(inputs[n, -1])
            return changed

        taps = {self.gates.key_layer: look, self.layer: lay}
        with self.model.hearing(heard), self.model.tap(taps):
            yield
