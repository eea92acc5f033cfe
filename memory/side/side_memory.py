"""The side memory: deltas for one layer in shards, found by key, laid over the rows they concern.

A shard is a delta ΔW = B A of low rank for the down projection of the side layer, trained on a
fact. A fact has two kinds of keys. Its *subject keys*, the key layer's outputs at the subject's
last token, are in the index and are compared with every token of a prompt. Its *end keys*, the
side layer's outputs where its prompts end, tell what is asked of the subject. A fact fires for a
row when a subject key and an end key are near enough, the prompt names the subject, and the shard's
own activation distance d(a) = ‖ΔW a‖ (WISE, Wang et al. 2024, eq. 4) confirms it. (Keys alone mix
up subjects that end alike once there are thousands.) A name leads to its few facts at once; the
index is searched for those that may go without theirs. The decision is taken once for each row, at
the prompt's end, and holds for every token decoded after it. A row without a match is not touched:
its numbers are those of the weights, bit for bit.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from memory.errors import KeditError
from memory.model.editable import EditableModel
from memory.side.index import KeyIndex
from memory.side.subject_matcher import Names

CANDIDATES = 16  # vectors looked at for each token; a fact has several
ROUNDING = 1e-5  # by which a cosine may differ where it is computed among others


def number_of(fact_id: str) -> int:
    """A fact's id, 12 hex digits, as the index wants it."""
    return int(fact_id, 16)


def fact_id_of(number: int) -> str:
    """The reverse of `number_of`."""
    return f"{number:012x}"


@dataclass(frozen=True)
class Delta:
    """ΔW = B A of low rank: `up` is B (hidden, rank), `down` is A (rank, width). Several of them
    may lie side by side, along first dimensions."""

    up: Tensor
    down: Tensor

    def moved(self, inputs: Tensor) -> Tensor:
        """ΔW k (..., hidden) of inputs k (..., width): two small products, never ΔW itself."""
        return inputs @ self.down.mT @ self.up.mT


@dataclass(frozen=True)
class Shard:
    """ΔW of a fact, and the distance from which it may answer."""

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
        # Facts that are meant also where they are not named. Few have such a prompt, and these are
        # looked for apart, where nothing is named: their subject keys, and their end keys as one.
        self.unnamed: set[str] = set()
        self._unnamed_keys = KeyIndex(model.hidden, gpu=model.device.type == "cuda")
        self._unnamed_ends: Tensor | None = None  # (keys, hidden), of none until they are asked
        self.hidden: set[str] = set()  # facts that do not fire for the time being
        self.index = KeyIndex(model.hidden, gpu=model.device.type == "cuda")

    def key(self, layer: int, outputs: Tensor) -> Tensor:
        """Retrieval keys (..., hidden) from a layer's outputs: centred, of unit length."""
        away = outputs.float() - self.centres[layer]
        keys: Tensor = away / away.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return keys

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
        self._want_name(fact_id)
        if unnamed:
            self.unnamed.add(fact_id)
            self._unnamed_keys.add(number_of(fact_id), keys.subject)
        self.shard_of[fact_id] = shard

    def drop(self, fact_id: str) -> None:
        """Make a fact unfindable, at once."""
        if self.shard_of.pop(fact_id, None) is not None:
            del self.end_keys[fact_id]
            self.names.drop(fact_id)
            self._want_name(fact_id)
            self.index.remove(number_of(fact_id))

    def _want_name(self, fact_id: str) -> None:
        """Look for a fact no more where it is not named."""
        self._unnamed_ends = None
        self.unnamed.discard(fact_id)
        self._unnamed_keys.remove(number_of(fact_id))

    def broken_keys(self) -> list[int]:
        """The numbers of the facts that have a subject key which is not finite."""
        return sorted({*self.index.broken(), *self._unnamed_keys.broken()})

    def candidates(self, ids: Sequence[int], outputs: Tensor) -> list[str]:
        """Facts whose subject stands in a prompt: its ids, and the key layer's outputs (tokens,
        hidden) for them."""
        named = self.named(ids)
        keys = self.key(self.gates.key_layer, outputs)
        return [*self._near(named, keys), *self._near_unnamed(named, keys)]

    def named(self, ids: Sequence[int]) -> set[str]:
        """Facts whose subject a prompt names."""
        return self.names.in_text(self.model.decode(ids)) if self.shard_of else set()

    def _near(self, named: set[str], keys: Tensor) -> list[str]:
        """Those of the named facts that have a subject key near one of keys (n, hidden)."""
        near = self.index.those_near([number_of(n) for n in named], keys, self.gates.subject)
        return [fact_id_of(n) for n in near]

    def _near_unnamed(self, named: set[str], keys: Tensor) -> list[str]:
        """The facts that are not named, and need not be, with a subject key near one of keys."""
        near = map(fact_id_of, self._unnamed_keys.near(keys, CANDIDATES, self.gates.unnamed))
        return [n for n in near if n not in named]

    def _unnamed_asked(self, outputs: Tensor) -> bool:
        """Whether what is asked, outputs (hidden,), is near an end key of a fact that need not be
        named. Of ordinary text it hardly ever is."""
        if not self.unnamed:
            return False
        if self._unnamed_ends is None:
            self._unnamed_ends = torch.cat([self.end_keys[n] for n in sorted(self.unnamed)])
        nearest = (self._unnamed_ends @ self.key(self.layer, outputs)).max()
        return float(nearest) >= self.gates.end - ROUNDING

    def asked(self, candidates: Iterable[str], outputs: Tensor) -> dict[str, float]:
        """How near each candidate's end keys are to what is asked: outputs (hidden,)."""
        asked = self.key(self.layer, outputs)
        return {n: float((self.end_keys[n] @ asked).max()) for n in candidates}

    def confirm(self, scores: Mapping[str, float], inputs: Tensor) -> Match | None:
        """Of facts by how near they are to what is asked, the nearest whose shard agrees:
        inputs (width,) of the side layer where the prompt ends."""
        for fact_id in sorted(scores, key=lambda n: -scores[n]):
            if scores[fact_id] < self.gates.end:
                return None
            shard = self.shards[self.shard_of[fact_id]]
            margin = float(shard.delta.moved(inputs).norm()) / shard.threshold
            if margin >= 1 and fact_id not in self.hidden:
                return Match(fact_id, self.shard_of[fact_id], scores[fact_id], margin)
        return None

    def route(
        self, named: set[str], keyed: Tensor, inputs: Tensor, outputs: Tensor
    ) -> Match | None:
        """The fact that fires for a row: of what it names, the key layer's outputs (tokens,
        hidden), and from the side layer where it ends inputs (width,) and outputs (hidden,).

        What costs less is asked first: most rows that name a fact ask for something else. The
        index is searched only where a fact that need not be named may be meant.
        """
        scores = self.asked(named, outputs) if named else {}
        wanted = {n for n, score in scores.items() if score >= self.gates.end}
        unnamed = self._unnamed_asked(outputs)
        if not wanted and not unnamed:
            return None
        keys = self.key(self.gates.key_layer, keyed)
        found = {n: scores[n] for n in self._near(wanted, keys)}
        if unnamed:
            found |= self.asked(self._near_unnamed(named, keys), outputs)
        return self.confirm(found, inputs)

    @contextmanager
    def overlay(self, fired: list[Match | None]) -> Iterator[None]:
        """Route the rows of one batch: decided in its first pass, kept for all that follow.

        `fired` is filled with the decision for each row. Rows must end at their last column. Once
        no row can be routed any more the model runs as it would without: nothing is tapped.
        """
        fired.clear()
        named: list[set[str]] = []
        keyed: list[Tensor] = []

        def hear(ids: Tensor) -> None:
            named.extend(map(self.named, ids.tolist()))
            if any(named) or self.unnamed:
                taps.enter_context(self.model.tap({self.gates.key_layer: look, self.layer: lay}))
            else:
                fired.extend(None for _ in named)

        def look(_inputs: Tensor, outputs: Tensor) -> None:
            if not fired:
                keyed.append(outputs)

        def lay(inputs: Tensor, outputs: Tensor) -> Tensor | None:
            if not fired:
                rows = zip(named, keyed.pop(), inputs[:, -1], outputs[:, -1], strict=True)
                fired.extend(self.route(*row) for row in rows)
            if not any(fired):
                taps.close()
                return None
            deltas = [self.shards[m.shard].delta if m else None for m in fired]
            return _laid(deltas, inputs, outputs)

        with ExitStack() as taps, self.model.hearing(hear):
            yield

    @contextmanager
    def laid(self, deltas: Sequence[Delta | None]) -> Iterator[None]:
        """Lay over each row of a batch what was decided of it before; over none, at no cost."""
        if not any(deltas):
            yield
            return
        with self.model.tap({self.layer: partial(_laid, deltas)}):
            yield


def _laid(deltas: Sequence[Delta | None], inputs: Tensor, outputs: Tensor) -> Tensor:
    """The side layer's outputs (rows, tokens, hidden), each row's last one moved by its ΔW."""
    changed = outputs.clone()
    for n, delta in enumerate(deltas):
        if delta is not None:
            changed[n, -1] += delta.moved(inputs[n, -1])
    return changed
