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

from memory.errors import UnsupportedModel
from memory.model.editable import EditableModel
from memory.side.index import KeyIndex
from memory.side.subject_matcher import SubjectMatcher

VECTORS_PER_TOKEN = 16  # vectors looked at for each token; a fact has several
COSINE_TOLERANCE = 1e-5  # by which a cosine may differ where it is computed among others


def to_fact_number(fact_id: str) -> int:
    """A fact's id, 12 hex digits, as the index wants it."""
    return int(fact_id, 16)


def to_fact_id(number: int) -> str:
    """The reverse of `number_of`."""
    return f"{number:012x}"


@dataclass(frozen=True)
class Delta:
    """ΔW = B A of low rank: `up` is B (hidden, rank), `down` is A (rank, width). Several of them
    may lie side by side, along first dimensions."""

    up: Tensor
    down: Tensor

    def apply_to(self, inputs: Tensor) -> Tensor:
        """ΔW k (..., hidden) of inputs k (..., width): two small products, never ΔW itself."""
        return inputs @ self.down.mT @ self.up.mT


@dataclass(frozen=True)
class Shard:
    """ΔW of a fact, and the distance from which it may answer."""

    delta: Delta
    threshold: float


@dataclass(frozen=True)
class RetrievalKeys:
    """A fact's retrieval keys, of unit length: subject (n, hidden) and end (m, hidden)."""

    subject: Tensor
    end: Tensor


@dataclass(frozen=True)
class RoutingGates:
    """Where routing looks, and the least cosines that route; `unnamed` is that of a subject key
    where the prompt does not name the subject, of a fact that does not always name it either."""

    key_layer: int
    side_layer: int
    min_subject_cosine: float
    min_end_cosine: float
    min_unnamed_cosine: float


@dataclass(frozen=True)
class RoutingMatch:
    """The fact that fires for a row: its shard, the cosine of its end key, and the activation
    distance over the shard's threshold."""

    fact_id: str
    shard_id: int
    score: float
    margin: float


class SideMemory:
    """Shards and keys of the facts that live beside the weights."""

    def __init__(
        self, model: EditableModel, gates: RoutingGates, centres: Mapping[int, Tensor]
    ) -> None:
        """`centres`, by layer, are taken from every key. Raises KeditError: one layer too few."""
        if gates.key_layer >= gates.side_layer:
            raise UnsupportedModel(
                f"the key layer {gates.key_layer} is not below the side layer {gates.side_layer}",
                hint="a model needs at least two layers",
            )
        self.model, self.gates, self.layer = model, gates, gates.side_layer
        self.centres = {n: centres[n].to(model.device) for n in (gates.key_layer, self.layer)}
        self.shards: dict[int, Shard] = {}
        self.shard_ids: dict[str, int] = {}
        self.end_keys: dict[str, Tensor] = {}
        self.subject_matcher = SubjectMatcher()
        # Facts that are meant also where they are not named. Few have such a prompt, and these are
        # looked for apart, where nothing is named: their subject keys, and their end keys as one.
        self.unnamed_facts: set[str] = set()
        self._unnamed_index = KeyIndex(model.hidden_size, gpu=model.device.type == "cuda")
        self._unnamed_end_keys: Tensor | None = None  # (keys, hidden), of none until they are asked
        self.hidden_facts: set[str] = set()  # facts that do not fire for the time being
        self.key_index = KeyIndex(model.hidden_size, gpu=model.device.type == "cuda")

    def compute_keys(self, layer: int, outputs: Tensor) -> Tensor:
        """Retrieval keys (..., hidden) from a layer's outputs: centred, of unit length."""
        away = outputs.float() - self.centres[layer]
        keys: Tensor = away / away.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        return keys

    def add_fact(
        self,
        fact_id: str,
        shard: int,
        keys: RetrievalKeys,
        subject: str,
        *,
        unnamed: bool,
        indexed: bool = False,
    ) -> None:
        """Make a fact findable. `unnamed`: whether one of its prompts does without its subject;
        `indexed`: its subject keys are in the index already."""
        if not indexed:
            self.remove_fact(fact_id)
            self.key_index.add(to_fact_number(fact_id), keys.subject)
        self.end_keys[fact_id] = keys.end.to(self.model.device)
        self.subject_matcher.add_subject(fact_id, subject)
        self._remove_unnamed(fact_id)
        if unnamed:
            self.unnamed_facts.add(fact_id)
            self._unnamed_index.add(to_fact_number(fact_id), keys.subject)
        self.shard_ids[fact_id] = shard

    def remove_fact(self, fact_id: str) -> None:
        """Make a fact unfindable, at once."""
        if self.shard_ids.pop(fact_id, None) is not None:
            del self.end_keys[fact_id]
            self.subject_matcher.remove_fact(fact_id)
            self._remove_unnamed(fact_id)
            self.key_index.remove(to_fact_number(fact_id))

    def _remove_unnamed(self, fact_id: str) -> None:
        """Look for a fact no more where it is not named."""
        self._unnamed_end_keys = None
        self.unnamed_facts.discard(fact_id)
        self._unnamed_index.remove(to_fact_number(fact_id))

    def find_non_finite_keys(self) -> list[int]:
        """The numbers of the facts that have a subject key which is not finite."""
        return sorted({*self.key_index.find_non_finite(), *self._unnamed_index.find_non_finite()})

    def find_candidates(self, ids: Sequence[int], outputs: Tensor) -> list[str]:
        """Facts whose subject stands in a prompt: its ids, and the key layer's outputs (tokens,
        hidden) for them."""
        named = self.find_named(ids)
        keys = self.compute_keys(self.gates.key_layer, outputs)
        return [*self._filter_near(named, keys), *self._find_near_unnamed(named, keys)]

    def find_named(self, ids: Sequence[int]) -> set[str]:
        """Facts whose subject a prompt names."""
        return (
            self.subject_matcher.find_named_facts(self.model.decode(ids))
            if self.shard_ids
            else set()
        )

    def _filter_near(self, named: set[str], keys: Tensor) -> list[str]:
        """Those of the named facts that have a subject key near one of keys (n, hidden)."""
        near = self.key_index.filter_near(
            [to_fact_number(n) for n in named], keys, self.gates.min_subject_cosine
        )
        return [to_fact_id(n) for n in near]

    def _find_near_unnamed(self, named: set[str], keys: Tensor) -> list[str]:
        """The facts that are not named, and need not be, with a subject key near one of keys."""
        near = map(
            to_fact_id,
            self._unnamed_index.find_near(keys, VECTORS_PER_TOKEN, self.gates.min_unnamed_cosine),
        )
        return [n for n in near if n not in named]

    def _may_mean_unnamed(self, outputs: Tensor) -> bool:
        """Whether what is asked, outputs (hidden,), is near an end key of a fact that need not be
        named. Of ordinary text it hardly ever is."""
        if not self.unnamed_facts:
            return False
        if self._unnamed_end_keys is None:
            self._unnamed_end_keys = torch.cat(
                [self.end_keys[n] for n in sorted(self.unnamed_facts)]
            )
        nearest = (self._unnamed_end_keys @ self.compute_keys(self.layer, outputs)).max()
        return float(nearest) >= self.gates.min_end_cosine - COSINE_TOLERANCE

    def score_candidates(self, candidates: Iterable[str], outputs: Tensor) -> dict[str, float]:
        """How near each candidate's end keys are to what is asked: outputs (hidden,)."""
        asked = self.compute_keys(self.layer, outputs)
        return {n: float((self.end_keys[n] @ asked).max()) for n in candidates}

    def confirm_match(self, scores: Mapping[str, float], inputs: Tensor) -> RoutingMatch | None:
        """Of facts by how near they are to what is asked, the nearest whose shard agrees:
        inputs (width,) of the side layer where the prompt ends."""
        for fact_id in sorted(scores, key=lambda n: -scores[n]):
            if scores[fact_id] < self.gates.min_end_cosine:
                return None
            shard = self.shards[self.shard_ids[fact_id]]
            margin = float(shard.delta.apply_to(inputs).norm()) / shard.threshold
            if margin >= 1 and fact_id not in self.hidden_facts:
                return RoutingMatch(fact_id, self.shard_ids[fact_id], scores[fact_id], margin)
        return None

    def route_row(
        self, named: set[str], keyed: Tensor, inputs: Tensor, outputs: Tensor
    ) -> RoutingMatch | None:
        """The fact that fires for a row: of what it names, the key layer's outputs (tokens,
        hidden), and from the side layer where it ends inputs (width,) and outputs (hidden,).

        What costs less is asked first: most rows that name a fact ask for something else. The
        index is searched only where a fact that need not be named may be meant.
        """
        scores = self.score_candidates(named, outputs) if named else {}
        wanted = {n for n, score in scores.items() if score >= self.gates.min_end_cosine}
        unnamed = self._may_mean_unnamed(outputs)
        if not wanted and not unnamed:
            return None
        keys = self.compute_keys(self.gates.key_layer, keyed)
        found = {n: scores[n] for n in self._filter_near(wanted, keys)}
        if unnamed:
            found |= self.score_candidates(self._find_near_unnamed(named, keys), outputs)
        return self.confirm_match(found, inputs)

    @contextmanager
    def overlay_matches(self, fired: list[RoutingMatch | None]) -> Iterator[None]:
        """Route the rows of one batch: decided in its first pass, kept for all that follow.

        `fired` is filled with the decision for each row. Rows must end at their last column. Once
        no row can be routed any more the model runs as it would without: nothing is tapped.
        """
        fired.clear()
        named: list[set[str]] = []
        keyed: list[Tensor] = []

        def find_named_rows(ids: Tensor) -> None:
            named.extend(map(self.find_named, ids.tolist()))
            if any(named) or self.unnamed_facts:
                taps.enter_context(
                    self.model.tap_layers(
                        {self.gates.key_layer: keep_key_outputs, self.layer: apply_deltas}
                    )
                )
            else:
                fired.extend(None for _ in named)

        def keep_key_outputs(_inputs: Tensor, outputs: Tensor) -> None:
            if not fired:
                keyed.append(outputs)

        def apply_deltas(inputs: Tensor, outputs: Tensor) -> Tensor | None:
            if not fired:
                rows = zip(named, keyed.pop(), inputs[:, -1], outputs[:, -1], strict=True)
                fired.extend(self.route_row(*row) for row in rows)
            if not any(fired):
                taps.close()
                return None
            deltas = [self.shards[m.shard_id].delta if m else None for m in fired]
            return _add_deltas(deltas, inputs, outputs)

        with ExitStack() as taps, self.model.observe_input_ids(find_named_rows):
            yield

    @contextmanager
    def overlay_deltas(self, deltas: Sequence[Delta | None]) -> Iterator[None]:
        """Lay over each row of a batch what was decided of it before; over none, at no cost."""
        if not any(deltas):
            yield
            return
        with self.model.tap_layers({self.layer: partial(_add_deltas, deltas)}):
            yield


def _add_deltas(deltas: Sequence[Delta | None], inputs: Tensor, outputs: Tensor) -> Tensor:
    """The side layer's outputs (rows, tokens, hidden), each row's last one moved by its ΔW."""
    changed = outputs.clone()
    for n, delta in enumerate(deltas):
        if delta is not None:
            changed[n, -1] += delta.apply_to(inputs[n, -1])
    return changed
