"""Scores of facts by what a user's words ask.

A question is compared with each fact whose subject it names, the subject masked on both sides. What
is compared is the sentence that names the subject, and within it the clause, so that two questions
in one message, or a request about the form of the answer, do not blur each other.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from memory.facts import Fact
from memory.side.question_reader import (
    REFERENCE,
    AskedScore,
    RelationCosine,
    ScoreParts,
    Span,
)
from policies.asking.answer_type import can_answer
from policies.asking.bare_wording import BareWording, reduce_question, reduce_statement
from policies.asking.relation_bank import mask_prompt, mask_spans
from policies.asking.relation_index import (
    CERTAIN_SIMILARITY,
    SAME_WORDING,
    RelationIndex,
    mask_prompts,
)

# The logit that a question asks for a fact, by cosines: with the fact, with the nearest relation of
# the bank that is not the fact's (its rival), and with the fact's own. Where the bank has the
# fact's relation, it counts how far the rival is ahead of it, or behind. By itself a rival counts
# up to a cosine of MAX_RIVAL: beyond that the words are clear, and not the rival. Fitted on
# questions of CounterFact against those of its other relations; where the bank lacks the relation,
# with its relations left out of the bank. The biases are chosen: they place the gate.
KNOWN_FACT_WEIGHT, KNOWN_RIVAL_WEIGHT, KNOWN_BIAS = 14.0, 10.1, 4.05
LEAD_WEIGHT, OWN_LEAD_WEIGHT = 1.5, 3.9
FACT_WEIGHT, RIVAL_WEIGHT, BIAS = 16.9, 5.2, -1.4
MAX_RIVAL = 0.8
# The same that a sentence comes to state a fact, by cosines: with the fact, with the nearest of its
# prompts and its relation's statements, and with those of the nearest other relation. Fitted on
# paraphrases of CounterFact, with maps that had seen their wordings and with maps that had not.
STATED_FACT_WEIGHT, STATED_OWN_WEIGHT, STATED_RIVAL_WEIGHT, STATED_BIAS = 10.0, 3.9, 1.1, -2.5
CERTAIN_LOGIT = 6.0
# Least logit where words tell no relation, and neither does the fact: it gives way to facts that
# are asked for by words of their own.
BARE_LOGIT = 2.0
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")
CLAUSE_END = re.compile(r"[,;:]\s+|\s+(?:and|but|or)\s+")


@dataclass(frozen=True)
class _Meaning:
    """Vectors of a fact's wordings (n, width), and which relations of the bank are its own; vectors
    of its prompts with its target and as sentences (n, width), which relations these state, and how
    many sentences the longest has; its prompts that tell no relation, and such statements of it."""

    wordings: Tensor
    own_relations: Tensor
    statements: Tensor
    sentences: Tensor
    stated_relations: Tensor
    longest: int
    bare: Set[BareWording]
    bare_statements: Set[BareWording]


class AskedFacts:
    """The live facts, by what they answer. What a fact means is computed when it is first needed,
    and the index of relations is loaded then."""

    def __init__(self, load_index: Callable[[], RelationIndex]) -> None:
        """load_index: returns the same index each time."""
        self._load_index = load_index
        self._facts: dict[str, Fact] = {}
        self._meanings: dict[str, _Meaning] = {}

    @property
    def index(self) -> RelationIndex:
        """The relations that are known."""
        return self._load_index()

    def add_fact(self, fact: Fact) -> None:
        """Add a fact, or replace it."""
        self._facts[fact.id] = fact
        self._meanings.pop(fact.id, None)

    def remove_fact(self, fact_id: str) -> None:
        """Remove a fact, if it is there."""
        self._facts.pop(fact_id, None)
        self._meanings.pop(fact_id, None)

    def score_facts(self, text: str, named: Mapping[str, Sequence[Span]]) -> dict[str, AskedScore]:
        """Return the logits that a text asks for each of the facts, whose subjects it names at
        spans; without those that cannot be the answer."""
        texts = {n: _cut_asked_texts(text, spans) for n, spans in named.items() if n in self._facts}
        distinct = list(dict.fromkeys(asked for group in texts.values() for asked in group))
        if not distinct:
            return {}
        vectors = self.index.encoder.encode_questions(distinct)
        relations = self.index.compare_relations(vectors)
        rows = {asked: n for n, asked in enumerate(distinct)}
        scores = {}
        for fact_id, group in texts.items():
            target = self._facts[fact_id].target
            usable = [asked for asked in group if can_answer(asked, target)]
            if not usable:
                continue
            chosen = [rows[asked] for asked in usable]
            meaning = self._find_meaning(fact_id)
            bare = [group[asked].is_whole and _is_bare(asked, meaning) for asked in usable]
            logits = _compute_logits(meaning, bare, vectors[chosen], relations[chosen])
            alone = [n for n, asked in enumerate(usable) if group[asked].is_clause]
            clause_score = float(logits[alone].max()) if alone else -math.inf
            clause = group[usable[int(logits.argmax())]].clause
            scores[fact_id] = AskedScore(float(logits.max()), clause, clause_score)
        return scores

    def score_statements(self, text: str, named: Mapping[str, Sequence[Span]]) -> dict[str, float]:
        """Return the logits that a sentence which ends a text, and goes on, comes to state each of
        the facts, whose subjects the text names at spans."""
        scores = {}
        for fact_id in (n for n in named if n in self._facts):
            meaning = self._find_meaning(fact_id)
            endings = _cut_endings(text, named[fact_id], meaning.longest)
            if endings:
                vectors = self.index.encoder.encode_sentences(endings)
                relations = self.index.compare_statements(vectors)
                stated = _compute_stated(meaning, endings, vectors, relations)
                scores[fact_id] = float(stated.max())
        return scores

    def explain_score(self, text: str, fact_id: str, spans: Sequence[Span]) -> ScoreParts | None:
        """Return the score of one fact with its parts; None if it cannot be the answer."""
        fact = self._facts.get(fact_id)
        parts = _cut_asked_texts(text, spans)
        texts = [asked for asked in parts if fact and can_answer(asked, fact.target)]
        if not texts:
            return None
        vectors = self.index.encoder.encode_questions(texts)
        relations, meaning = self.index.compare_relations(vectors), self._find_meaning(fact_id)
        bare = [parts[asked].is_whole and _is_bare(asked, meaning) for asked in texts]
        logits = _compute_logits(meaning, bare, vectors, relations)
        best = int(logits.argmax())
        own = meaning.own_relations
        return ScoreParts(
            texts[best],
            float(logits[best]),
            float((vectors[best] @ meaning.wordings.T).max()),
            self._find_nearest(relations[best].masked_fill(~own, -1.0)) if own.any() else None,
            self._find_nearest(relations[best].masked_fill(own, -1.0)),
            is_bare=bare[best],
        )

    def _find_nearest(self, relations: Tensor) -> RelationCosine:
        nearest = int(relations.argmax())
        return RelationCosine(self.index.names[nearest], float(relations[nearest]))

    def _find_meaning(self, fact_id: str) -> _Meaning:
        if fact_id not in self._meanings:
            fact = self._facts[fact_id]
            stated = self.index.encode_statements(fact)
            wordings = [stated]
            if fact.questions:
                questions = [mask_prompt(q, fact.subject) for q in fact.questions]
                wordings.append(self.index.encoder.encode_questions(questions))
            means = self.index.average_prompts(fact)
            told = self.index.find_answered_relations(fact)
            stated_relations = (
                self.index.find_own_statements(stated)
                | self.index.find_stated_relations(means)
                | told
            )
            bare = set(filter(None, map(reduce_statement, mask_prompts(fact))))
            own = (
                self.index.find_own_relations(stated)
                | self.index.find_stated_relations(means, CERTAIN_SIMILARITY)
                | told
            )
            if fact.picture is not None:  # the bank is about names: what shows a building is none
                own = torch.zeros_like(own)
            self._meanings[fact_id] = _Meaning(
                torch.cat(wordings),
                own,
                stated,
                self.index.encode_prompts(fact),
                stated_relations,
                max(len(SENTENCE_END.split(p)) for p in (fact.prompt, *fact.paraphrases)),
                bare,
                bare | self.index.find_bare_statements(stated_relations),
            )
        return self._meanings[fact_id]


def _is_bare(question: str, meaning: _Meaning) -> bool:
    """Check that a question tells no relation, as a prompt of the fact."""
    return bool(meaning.bare) and reduce_question(question) in meaning.bare


def _compute_logits(
    meaning: _Meaning, bare: Sequence[bool], vectors: Tensor, relations: Tensor
) -> Tensor:
    """Return logits (n,) of questions with vectors (n, width) and similarities to relations
    (n, relations). bare: which of them tell no relation, as the fact."""
    fact = (vectors @ meaning.wordings.T).amax(1)
    nearest = relations.masked_fill(meaning.own_relations, -1.0).amax(1)
    rival = nearest.clamp(max=MAX_RIVAL)
    if meaning.own_relations.any():
        own = relations.masked_fill(~meaning.own_relations, -1.0).amax(1)
        lead = nearest - own
        against = LEAD_WEIGHT * lead.clamp(min=0) + OWN_LEAD_WEIGHT * lead.clamp(max=0)
        logits = KNOWN_BIAS + KNOWN_FACT_WEIGHT * fact - KNOWN_RIVAL_WEIGHT * rival - against
    else:
        logits = BIAS + FACT_WEIGHT * fact - RIVAL_WEIGHT * rival
    return _raise_bare(logits, bare)


def _raise_bare(logits: Tensor, bare: Sequence[bool]) -> Tensor:
    """Raise the logits (n,) of bare words to their least, in their order."""
    return torch.where(torch.tensor(bare), logits.maximum(BARE_LOGIT + logits.sigmoid()), logits)


def _compute_stated(
    meaning: _Meaning, sentences: Sequence[str], vectors: Tensor, relations: Tensor
) -> Tensor:
    """Return logits (n,) of sentences with vectors (n, width) and similarities to relations
    (n, relations)."""
    fact = (vectors @ meaning.statements.T).amax(1)
    stated = relations.masked_fill(~meaning.stated_relations, 0.0).amax(1)
    prompt = (vectors @ meaning.sentences.T).amax(1)
    own = torch.maximum(prompt, stated)
    rival = relations.masked_fill(meaning.stated_relations, -1.0).amax(1)
    weighted = STATED_FACT_WEIGHT * fact + STATED_OWN_WEIGHT * own - STATED_RIVAL_WEIGHT * rival
    known = meaning.bare_statements
    bare = [bool(known) and reduce_statement(sentence) in known for sentence in sentences]
    logits = _raise_bare(weighted + STATED_BIAS, bare)
    # The very words of a prompt state its fact, whatever they tell.
    return torch.where(prompt >= SAME_WORDING, CERTAIN_LOGIT, logits)


@dataclass(frozen=True)
class _AskedPart:
    """The clause (start, end) that a part of a text asks in; is_clause: the part is that clause;
    is_whole: it is a whole sentence."""

    clause: Span
    is_clause: bool
    is_whole: bool


def _cut_asked_texts(text: str, spans: Sequence[Span]) -> dict[str, _AskedPart]:
    """Return the sentences and clauses of a text that hold one of the spans, the spans masked; the
    whole text, and its last sentence, where there are none."""
    sentences = _split_spans(SENTENCE_END, text)
    if not spans:
        last = _AskedPart(sentences[-1], is_clause=True, is_whole=True)
        return {text: last, text[slice(*last.clause)]: last}
    found = dict[str, _AskedPart]()
    for sentence in sentences:
        if _find_inside(spans, sentence):
            parts = _split_spans(CLAUSE_END, text[slice(*sentence)])
            placed = [(start + sentence[0], end + sentence[0]) for start, end in parts]
            clauses = [clause for clause in placed if _find_inside(spans, clause)] or [sentence]
            for clause in clauses:
                part = _AskedPart(clause, True, clause == sentence)
                found.setdefault(_mask_part(text, clause, spans), part)
            whole = _AskedPart(clauses[0], False, True)
            found.setdefault(_mask_part(text, sentence, spans), whole)
    return found or {mask_spans(text, spans): _AskedPart((0, len(text)), True, True)}


def _find_inside(spans: Sequence[Span], part: Span) -> list[Span]:
    """Return the spans that lie in a part of their text."""
    return [span for span in spans if part[0] <= span[0] and span[1] <= part[1]]


def _mask_part(text: str, part: Span, spans: Sequence[Span]) -> str:
    """Return a part of a text with the spans in it masked."""
    inside = _find_inside(spans, part)
    return mask_spans(text[slice(*part)], [(a - part[0], b - part[0]) for a, b in inside])


def _cut_endings(text: str, spans: Sequence[Span], sentences: int) -> list[str]:
    """Return the last sentence of a text, and the last few, as many as a prompt has, with the spans
    masked; without those that neither hold a span nor refer to a name by a pronoun."""
    masked = mask_spans(text, spans)
    behind = len(text) - max((end for _, end in spans), default=0)  # characters after the last one
    starts = [start for start, _ in _split_spans(SENTENCE_END, masked)]
    endings = [masked[start:] for start in reversed(starts[-sentences:])]
    return [
        ending.strip(" ,")
        for ending in endings
        if (spans and len(ending) > behind) or REFERENCE.search(ending)
    ]


def _split_spans(separator: re.Pattern[str], text: str) -> list[Span]:
    """Return the spans of the parts of a text between separators; one at least."""
    parts, at = list[Span](), 0
    for match in separator.finditer(text):
        parts.append((at, match.start()))
        at = match.end()
    return [part for part in [*parts, (at, len(text))] if part[1] > part[0]] or [(0, len(text))]
