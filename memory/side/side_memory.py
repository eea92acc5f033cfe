"""Side memory: low-rank deltas for one layer, retrieved by key and applied to the rows they match.

A shard is a delta ΔW = B A of low rank for the down projection of the side layer, trained on a
fact. A fact has two kinds of keys. Its *subject keys*, the key layer's outputs at the subject's
last token, are in the index and are compared with every token of a prompt. Its *end keys*, the
side layer's outputs at the ends of its prompts, represent the question. A fact fires for a row when
a subject key and an end key are near enough, the prompt names the subject, and the shard's own
activation distance d(a) = ‖ΔW a‖ (WISE, Wang et al. 2024, eq. 4) confirms it. (Keys alone confuse
subjects with similar ends once there are thousands.) Facts that are named are looked up by name;
the index is searched only for those that need no name.

Where there is a reader, words decide in place of keys, which confuse a subject's relations: it
scores how far a sentence comes to state each of the facts that it names, and how far a question
asks for them. A question ends alike whatever it asks, in a chat in the template's own tokens.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from memory.errors import UnsupportedModel
from memory.model.chat_layout import find_chat_layout
from memory.model.continuation import encode_behind
from memory.model.editable import EditableModel
from memory.picture_marks import MARK
from memory.side.index import KeyIndex, to_fact_id, to_fact_number
from memory.side.picture_names import PictureNames
from memory.side.prompt_reader import PromptReader, PromptReading
from memory.side.question_reader import AskedQuestion, AskedScore, QuestionReader
from memory.side.shards import THRESHOLD_RATIO, RetrievalKeys, RoutingGates, RoutingMatch, Shard
from memory.side.word_matches import choose_asked, choose_best

# Of a question about a picture: half as far as the shard moves its own prompts.
MIN_PICTURE_MARGIN = 0.5 / THRESHOLD_RATIO
VECTORS_PER_TOKEN = 16  # nearest vectors searched for each token; a fact has several
COSINE_TOLERANCE = 1e-5  # of a cosine computed in a product of another shape


class SideMemory:
    """Shards and keys of the facts outside the weights."""

    def __init__(
        self,
        model: EditableModel,
        gates: RoutingGates,
        centres: Mapping[int, Tensor],
        reader: QuestionReader | None = None,
    ) -> None:
        """`centres`, by layer, are subtracted from every key. `reader`: of questions; without one
        keys alone decide. Raises UnsupportedModel."""
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
        self.prompt_reader = PromptReader(reader, find_chat_layout(model.tokenizer))
        self.reader, self.subject_matcher = reader, self.prompt_reader.subject_matcher
        self.line_end = tuple(encode_behind(model.tokenizer, "\n"))
        self.targets: dict[str, str] = {}
        # Facts with a prompt that does not name their subject. They are few, and have an index of
        # their own subject keys, and their end keys in one tensor.
        self.unnamed_facts: set[str] = set()
        self._unnamed_index = KeyIndex(model.hidden_size, gpu=model.device.type == "cuda")
        self._unnamed_end_keys: Tensor | None = None  # (keys, hidden), built when it is needed
        self.hidden_facts: set[str] = set()  # facts that must not fire for now
        self.key_index = KeyIndex(model.hidden_size, gpu=model.device.type == "cuda")
        self.pictures = PictureNames(model, gates.min_picture_cosine)

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
        names: Sequence[str],
        *,
        unnamed: bool,
        target: str = "",
        indexed: bool = False,
    ) -> None:
        """Add a fact, with the names of its subject. `unnamed`: one of its prompts has none;
        `target`: what its shard says, and is released behind; `indexed`: its subject keys are in
        the index already."""
        if not indexed:
            self.remove_fact(fact_id)
            self.key_index.add(to_fact_number(fact_id), keys.subject)
        self.end_keys[fact_id] = keys.end.to(self.model.device)
        self.subject_matcher.add_names(fact_id, names)
        self._remove_unnamed(fact_id)
        self.pictures.remove_fact(fact_id)
        if (mark := MARK.fullmatch(next(iter(names), ""))) is not None:
            self.pictures.add_fact(fact_id, mark[1], keys.subject)
        elif unnamed:
            self.unnamed_facts.add(fact_id)
            self._unnamed_index.add(to_fact_number(fact_id), keys.subject)
        self.shard_ids[fact_id], self.targets[fact_id] = shard, target

    def remove_fact(self, fact_id: str) -> None:
        """Remove a fact, if it is there."""
        if self.shard_ids.pop(fact_id, None) is not None:
            del self.end_keys[fact_id], self.targets[fact_id]
            if self.reader is not None:
                self.reader.remove_fact(fact_id)
            self.subject_matcher.remove_fact(fact_id)
            self._remove_unnamed(fact_id)
            self.pictures.remove_fact(fact_id)
            self.key_index.remove(to_fact_number(fact_id))

    def _remove_unnamed(self, fact_id: str) -> None:
        """Remove a fact from those that need no name."""
        self._unnamed_end_keys = None
        self.unnamed_facts.discard(fact_id)
        self._unnamed_index.remove(to_fact_number(fact_id))

    def is_asked(self, fact_id: str) -> bool:
        """Check that a fact is here, and has learned to be asked in words."""
        shard = self.shard_ids.get(fact_id)
        return shard is not None and self.shards[shard].is_asked

    def find_non_finite_keys(self) -> list[int]:
        """Return the numbers of facts that have a subject key which is not finite."""
        return sorted({*self.key_index.find_non_finite(), *self._unnamed_index.find_non_finite()})

    def find_candidates(self, ids: Sequence[int], outputs: Tensor) -> list[str]:
        """Return the facts whose subject is in a prompt, of its ids and the key layer's outputs
        (tokens, hidden)."""
        named = self.find_named(ids)
        keys = self.compute_keys(self.gates.key_layer, outputs)
        return [*self._filter_near(named, keys), *self._find_near_unnamed(named, keys)]

    def filter_near(self, named: set[str], outputs: Tensor) -> list[str]:
        """Return the facts that have a subject key near a token, by the key layer's outputs
        (tokens, hidden)."""
        return self._filter_near(named, self.compute_keys(self.gates.key_layer, outputs))

    def find_named(self, ids: Sequence[int]) -> set[str]:
        """Return the facts whose subject a prompt names."""
        if not self.shard_ids:
            return set()
        return self.subject_matcher.find_named_facts(self.read_text(ids))

    def read_prompt(self, ids: Sequence[int]) -> PromptReading:
        """Read a prompt's text, as far as it decides which facts may fire at its end."""
        named = self.find_named(ids)
        if not named or self.reader is None:
            return PromptReading(frozenset(named))
        if (asked := self.find_asked(ids)) is not None:
            return self.prompt_reader.read_question(asked, named)
        # Special tokens are no words of a sentence.
        return self.prompt_reader.read_sentence(self.read_text(ids), named)

    def is_chat(self, text: str) -> bool:
        """Check that a text, with its special tokens, is in chat form."""
        layout = self.prompt_reader.layout
        return layout is not None and layout.split_prompt(text) is not None

    def find_asked(self, ids: Sequence[int]) -> AskedQuestion | None:
        """Find the question that a prompt ends in."""
        return self.prompt_reader.find_question(self.read_text(ids, special=True))

    def read_text(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Return a prompt's text, with the special tokens if they are wanted. Pictures are called
        by the marks of those that facts are about, where they show the same."""
        return self.pictures.rename(self.model.decode(ids, special=special))

    def _filter_near(self, named: set[str], keys: Tensor) -> list[str]:
        """Return the named facts that have a subject key near one of keys (n, hidden), or whose
        picture was found in the prompt."""
        shown = [n for n in named if n in self.pictures]
        numbers = [to_fact_number(n) for n in named if n not in self.pictures]
        near = self.key_index.filter_near(numbers, keys, self.gates.min_subject_cosine)
        return [*shown, *map(to_fact_id, near)]

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
            match = self._match_fact(fact_id, scores[fact_id], inputs)
            if match.margin >= 1 and self._may_fire(fact_id):
                return match
        return None

    def route_row(
        self, reading: PromptReading, key_outputs: Tensor, inputs: Tensor, outputs: Tensor
    ) -> list[RoutingMatch]:
        """Return the fact that fires for a row, by the reading of its prompt, the key layer's
        outputs (tokens, hidden), and the side layer's inputs (width,) and outputs (hidden,) at its
        end; behind it those that the user asks for too, in their order. What the words tell comes
        before what the keys tell."""
        if matches := self._match_asked(reading.asked, inputs):
            may_go_on = reading.is_chat and self.line_end
            best = max(matches, key=lambda match: match.score)
            return matches if may_go_on else [best]
        if reading.stated is None:
            # Keys tell less of what is asked about a picture than words.
            shown = () if self.reader is None else filter(self.pictures.__contains__, reading.named)
            named = reading.named.difference(shown)
            match = self._match_keys(named, key_outputs, inputs, outputs, decided=reading.named)
        else:
            match = self._match_stated(reading.stated, inputs) or self._match_keys(
                (), key_outputs, inputs, outputs, decided=reading.named
            )
        return [] if match is None else [match]

    def _match_asked(self, asked: Mapping[str, AskedScore], inputs: Tensor) -> list[RoutingMatch]:
        """Return the facts that a question asks for, of those that have learned to be asked. Their
        shards need not confirm them: questions end alike, and sentences in ways that they have not
        seen. Those about a picture must: a question about it may be about any part of it, and there
        is no name to mask."""
        allowed = {n: a for n, a in asked.items() if self.is_asked(n) and self._may_fire(n)}
        chosen = choose_asked(allowed, self.gates.min_words_score)
        matches = [self._match_fact(n, score, inputs) for n, score in chosen.items()]
        return [
            one
            for one in matches
            if one.fact_id not in self.pictures or one.margin >= MIN_PICTURE_MARGIN
        ]

    def _match_stated(self, stated: Mapping[str, float], inputs: Tensor) -> RoutingMatch | None:
        """Return the fact that a sentence comes to state."""
        allowed = {n: score for n, score in stated.items() if self._may_fire(n)}
        best = choose_best(allowed, self.gates.min_words_score)
        return None if best is None else self._match_fact(best, allowed[best], inputs)

    def _may_fire(self, fact_id: str) -> bool:
        return fact_id not in self.hidden_facts

    def _match_fact(self, fact_id: str, score: float, inputs: Tensor) -> RoutingMatch:
        margin = self.measure_margin(fact_id, inputs)
        return RoutingMatch(fact_id, self.shard_ids[fact_id], score, margin)

    def match_reply(
        self, armed: Iterable[str], inputs: Tensor, outputs: Tensor
    ) -> RoutingMatch | None:
        """Return the armed fact that a chat's reply comes to state, by the side layer's inputs
        (width,) and outputs (hidden,) at its last token."""
        # One may have left since it was armed. What a reply says of a picture names nothing.
        known = [n for n in armed if n in self.end_keys and n not in self.pictures]
        scores = self.score_candidates(known, outputs)
        least = self.gates.min_reply_cosine
        return self.confirm_match({n: s for n, s in scores.items() if s >= least}, inputs)

    def _match_keys(
        self,
        named: Iterable[str],
        key_outputs: Tensor,
        inputs: Tensor,
        outputs: Tensor,
        decided: Iterable[str] = (),
    ) -> RoutingMatch | None:
        """Return the fact whose keys match. `decided`: facts that words have refused.

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
            found = self._find_near_unnamed({*named, *decided}, keys)
            candidates |= self.score_candidates(found, outputs)
        return self.confirm_match(candidates, inputs)

    def measure_margin(self, fact_id: str, inputs: Tensor) -> float:
        """Return the activation distance of a fact's shard, at inputs (width,), over its
        threshold."""
        shard = self.shards[self.shard_ids[fact_id]]
        return float(shard.delta.apply_to(inputs).norm()) / shard.threshold
