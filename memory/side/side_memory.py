"""Side memory: low-rank deltas for one layer, retrieved by key and applied to the rows they match.

A shard is a delta ΔW = B A of low rank for the down projection of the side layer, trained on a
fact. A fact has two kinds of keys. Its *subject keys*, the key layer's outputs at the subject's
last token, are in the index and are compared with every token of a prompt. Its *end keys*, the
side layer's outputs at the ends of its prompts, represent the question. A fact fires for a row when
a subject key and an end key are near enough, the prompt names the subject, and the shard's own
activation distance d(a) = ‖ΔW a‖ (WISE, Wang et al. 2024, eq. 4) confirms it. (Keys alone confuse
subjects with similar ends once there are thousands.) Facts that are named are looked up by name;
the index is searched only for those that need no name. Routing decides once for each row, at the
prompt's end, and the decision holds for every token decoded after it. A row without a match is not
touched: its output is unchanged, bit for bit.
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

VECTORS_PER_TOKEN = 16  # nearest vectors searched for each token; a fact has several
COSINE_TOLERANCE = 1e-5  # of a cosine computed in a product of another shape


def to_fact_number(fact_id: str) -> int:
    """Convert a fact's id, 12 hex digits, to its number in the index."""
    return int(fact_id, 16)


def to_fact_id(number: int) -> str:
    """Convert a fact's number in the index to its id."""
    return f"{number:012x}"


@dataclass(frozen=True)
class Delta:
    """ΔW = B A of low rank: `up` is B (hidden, rank), `down` is A (rank, width). Both may have
    batch dimensions in front."""

    up: Tensor
    down: Tensor

    def apply_to(self, inputs: Tensor) -> Tensor:
        """Compute ΔW k (..., hidden) of inputs k (..., width), without forming ΔW."""
        return inputs @ self.down.mT @ self.up.mT


@dataclass(frozen=True)
class Shard:
    """ΔW of a fact, and the least activation distance at which it fires."""

    delta: Delta
    threshold: float


@dataclass(frozen=True)
class RetrievalKeys:
    """Retrieval keys of a fact, of unit length: subject (n, hidden) and end (m, hidden)."""

    subject: Tensor
    end: Tensor


@dataclass(frozen=True)
class RoutingGates:
    """Layers of the keys, and the least cosines that route. `min_unnamed_cosine` is for subject
    keys when the prompt does not name the subject, of facts that do not always name it either."""

    key_layer: int
    side_layer: int
    min_subject_cosine: float
    min_end_cosine: float
    min_unnamed_cosine: float


@dataclass(frozen=True)
class RoutingMatch:
    """The fact that fires for a row: its shard, the cosine of its end key, and the ratio of the
    activation distance to the shard's threshold."""

    fact_id: str
    shard_id: int
    score: float
    margin: float


class SideMemory:
    """Shards and keys of the facts outside the weights."""

    def __init__(
        self, model: EditableModel, gates: RoutingGates, centres: Mapping[int, Tensor]
    ) -> None:
        """`centres`, by layer, are subtracted from every key. Raises UnsupportedModel."""
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
        # Facts with a prompt that does not name their subject. They are few, and have an index of
        # their own subject keys, and their end keys in one tensor.
        self.unnamed_facts: set[str] = set()
        self._unnamed_index = KeyIndex(model.hidden_size, gpu=model.device.type == "cuda")
        self._unnamed_end_keys: Tensor | None = None  # (keys, hidden), built when it is needed
        self.hidden_facts: set[str] = set()  # facts that must not fire for now
        self.key_index = KeyIndex(model.hidden_size, gpu=model.device.type == "cuda")

    def compute_keys(self, layer: int, outputs: Tensor) -> Tensor:
        """Compute retrieval keys (..., hidden) of a layer's outputs: centred, of unit length."""
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
        """Add a fact. `unnamed`: one of its prompts does not name its subject; `indexed`: its
        subject keys are in the index already."""
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
        """Remove a fact, if it is there."""
        if self.shard_ids.pop(fact_id, None) is not None:
            del self.end_keys[fact_id]
            self.subject_matcher.remove_fact(fact_id)
            self._remove_unnamed(fact_id)
            self.key_index.remove(to_fact_number(fact_id))

    def _remove_unnamed(self, fact_id: str) -> None:
        """Remove a fact from those that need no name."""
        self._unnamed_end_keys = None
        self.unnamed_facts.discard(fact_id)
        self._unnamed_index.remove(to_fact_number(fact_id))

    def find_non_finite_keys(self) -> list[int]:
        """Return the numbers of facts that have a subject key which is not finite."""
        return sorted({*self.key_index.find_non_finite(), *self._unnamed_index.find_non_finite()})

    def find_candidates(self, ids: Sequence[int], outputs: Tensor) -> list[str]:
        """Return the facts whose subject is in a prompt, of its ids and the key layer's outputs
        (tokens, hidden)."""
        named = self.find_named(ids)
        keys = self.compute_keys(self.gates.key_layer, outputs)
        return [*self._filter_near(named, keys), *self._find_near_unnamed(named, keys)]

    def find_named(self, ids: Sequence[int]) -> set[str]:
        """Return the facts whose subject a prompt names."""
        if not self.shard_ids:
            return set()
        return self.subject_matcher.find_named_facts(self.model.decode(ids))

    def _filter_near(self, named: set[str], keys: Tensor) -> list[str]:
        """Return the named facts that have a subject key near one of keys (n, hidden)."""
        numbers = [to_fact_number(n) for n in named]
        near = self.key_index.filter_near(numbers, keys, self.gates.min_subject_cosine)
        return [to_fact_id(n) for n in near]

    def _find_near_unnamed(self, named: set[str], keys: Tensor) -> list[str]:
        """Return unnamed facts that need no name, with a subject key near one of keys."""
        least = self.gates.min_unnamed_cosine
        near = self._unnamed_index.find_near(keys, VECTORS_PER_TOKEN, least)
        return [n for n in map(to_fact_id, near) if n not in named]

    def _may_mean_unnamed(self, outputs: Tensor) -> bool:
        """Check that the prompt's end, outputs (hidden,), is near an end key of a fact that needs
        no name. Ordinary text hardly ever is."""
        if not self.unnamed_facts:
            return False
        if self._unnamed_end_keys is None:
            keys = [self.end_keys[n] for n in sorted(self.unnamed_facts)]
            self._unnamed_end_keys = torch.cat(keys)
        nearest = (self._unnamed_end_keys @ self.compute_keys(self.layer, outputs)).max()
        return float(nearest) >= self.gates.min_end_cosine - COSINE_TOLERANCE

    def score_candidates(self, candidates: Iterable[str], outputs: Tensor) -> dict[str, float]:
        """Return each candidate's largest cosine of its end keys to outputs (hidden,) at the
        prompt's end."""
        query = self.compute_keys(self.layer, outputs)
        return {n: float((self.end_keys[n] @ query).max()) for n in candidates}

    def confirm_match(self, scores: Mapping[str, float], inputs: Tensor) -> RoutingMatch | None:
        """Return the best of scored facts whose shard confirms it, by the side layer's inputs
        (width,) at the prompt's end."""
        for fact_id in sorted(scores, key=lambda n: -scores[n]):
            if scores[fact_id] < self.gates.min_end_cosine:
                return None
            shard = self.shards[self.shard_ids[fact_id]]
            margin = float(shard.delta.apply_to(inputs).norm()) / shard.threshold
            if margin >= 1 and fact_id not in self.hidden_facts:
                return RoutingMatch(fact_id, self.shard_ids[fact_id], scores[fact_id], margin)
        return None

    def route_row(
        self, named: set[str], key_outputs: Tensor, inputs: Tensor, outputs: Tensor
    ) -> RoutingMatch | None:
        """Return the fact that fires for a row, by the facts that it names, the key layer's outputs
        (tokens, hidden), and the side layer's inputs (width,) and outputs (hidden,) at its end.

        Cheap checks come first: most rows that name a fact ask for something else. The index is
        searched only when a fact that needs no name may be meant.
        """
        scores = self.score_candidates(named, outputs) if named else {}
        wanted = {n for n, score in scores.items() if score >= self.gates.min_end_cosine}
        unnamed = self._may_mean_unnamed(outputs)
        if not wanted and not unnamed:
            return None
        keys = self.compute_keys(self.gates.key_layer, key_outputs)
        candidates = {n: scores[n] for n in self._filter_near(wanted, keys)}
        if unnamed:
            candidates |= self.score_candidates(self._find_near_unnamed(named, keys), outputs)
        return self.confirm_match(candidates, inputs)

    @contextmanager
    def overlay_matches(self, fired: list[RoutingMatch | None]) -> Iterator[None]:
        """Route the rows of one batch: decided in the first pass, kept for all that follow.

        `fired` is filled with the decision for each row. Rows must end at their last column. When
        no row can be routed, the taps are removed and the model runs as without a side memory.
        """
        fired.clear()
        named: list[set[str]] = []
        key_outputs: list[Tensor] = []

        def find_named_rows(ids: Tensor) -> None:
            named.extend(map(self.find_named, ids.tolist()))
            if any(named) or self.unnamed_facts:
                both = {self.gates.key_layer: keep_key_outputs, self.layer: apply_deltas}
                taps.enter_context(self.model.tap_layers(both))
            else:
                fired.extend(None for _ in named)

        def keep_key_outputs(_inputs: Tensor, outputs: Tensor) -> None:
            if not fired:
                key_outputs.append(outputs)

        def apply_deltas(inputs: Tensor, outputs: Tensor) -> Tensor | None:
            if not fired:
                rows = zip(named, key_outputs.pop(), inputs[:, -1], outputs[:, -1], strict=True)
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
        """Apply each row's delta, decided before; nothing is tapped when there is none."""
        if not any(deltas):
            yield
            return
        with self.model.tap_layers({self.layer: partial(_add_deltas, deltas)}):
            yield


def _add_deltas(deltas: Sequence[Delta | None], inputs: Tensor, outputs: Tensor) -> Tensor:
    """Add each row's ΔW k to the last token of the side layer's outputs (rows, tokens, hidden)."""
    changed = outputs.clone()
    for n, delta in enumerate(deltas):
        if delta is not None:
            changed[n, -1] += delta.apply_to(inputs[n, -1])
    return changed
