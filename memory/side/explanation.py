"""Explanation of a prompt: the facts that it names, and why each of them fires or does not.

The decision is the side memory's own. What it was made of is measured again, which takes a pass of
the layers up to the side layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from memory.side.prompt_states import PromptStates, read_states
from memory.side.question_reader import ScoreParts, Span
from memory.side.side_memory import SideMemory


class Reason(StrEnum):
    """A reason why a fact that a prompt names fires or does not."""

    FIRED = "fired"
    OTHER_FACT = "another-fact-fires"
    WAITS = "waits-for-another-fact"
    # In a question.
    NOT_MEANT = "not-named-in-the-question"
    WRONG_KIND = "not-an-answer"
    OTHER_QUESTION = "score-below-gate"
    NOT_LEARNED = "not-learned-to-be-asked"
    # In a sentence.
    OTHER_STATEMENT = "statement-below-gate"
    OTHER_END = "end-below-gate"
    OTHER_SUBJECT = "subject-below-gate"
    LOW_MARGIN = "margin-below-one"


@dataclass(frozen=True)
class NamedFact:
    """A fact that a prompt names. words: the score of a question's words, with its parts, where the
    prompt is a question that the fact may answer. stated: the score of a sentence's words, where
    these decide. margin: as in a match."""

    fact_id: str
    reason: Reason
    words: ScoreParts | None
    is_asked: bool  # its shard has learned to be asked
    stated: float | None
    end_cosine: float
    margin: float


@dataclass(frozen=True)
class PromptExplanation:
    """The question that a prompt ends in, if it ends in one, and the facts that it names: the one
    that fires first, then the nearest."""

    question: str | None
    named: list[NamedFact]


def explain_prompt(side: SideMemory, ids: Sequence[int]) -> PromptExplanation:
    """Explain which facts a prompt names, and why each of them fires or does not."""
    reading, states = side.read_prompt(ids), read_states(side, ids)
    matches = side.route_row(reading, states.key_outputs, states.inputs, states.outputs)
    fired = [match.fact_id for match in matches]
    asked = None if side.reader is None else side.find_asked(ids)
    question = asked.question if asked is not None else None
    spans = {} if question is None else side.prompt_reader.find_meant(question, reading.named)
    named = reading.named.union(fired)
    found = [
        _explain_fact(side, fact_id, fired, question, spans.get(fact_id), reading.stated, states)
        for fact_id in sorted(named)
    ]
    return PromptExplanation(question, sorted(found, key=_rank_fact))


def _rank_fact(fact: NamedFact) -> tuple[bool, float, float]:
    score = fact.words.score if fact.words is not None else float("-inf")
    return fact.reason is not Reason.FIRED, -score, -fact.end_cosine


def _explain_fact(
    side: SideMemory,
    fact_id: str,
    fired: Sequence[str],
    question: str | None,
    spans: Sequence[Span] | None,
    statements: Mapping[str, float] | None,
    states: PromptStates,
) -> NamedFact:
    words = None
    if question is not None and spans is not None and side.reader is not None:
        words = side.reader.explain_score(question, fact_id, spans)
    is_asked = side.shards[side.shard_ids[fact_id]].is_asked
    stated = None if statements is None else statements.get(fact_id)
    end = side.score_candidates([fact_id], states.outputs)[fact_id]
    margin = side.measure_margin(fact_id, states.inputs)
    if fact_id in fired:
        reason = Reason.FIRED if fact_id == fired[0] else Reason.WAITS
    elif question is None and statements is not None and stated is None:
        reason = Reason.OTHER_STATEMENT  # the sentence is about another subject
    elif question is None:
        reason = _explain_sentence(side, fact_id, stated, end, margin, states)
    elif spans is None:
        reason = Reason.NOT_MEANT
    elif words is None:
        reason = Reason.WRONG_KIND
    elif words.score < side.gates.min_words_score:
        reason = Reason.OTHER_QUESTION
    else:
        reason = Reason.OTHER_FACT if is_asked else Reason.NOT_LEARNED
    return NamedFact(fact_id, reason, words, is_asked, stated, end, margin)


def _explain_sentence(
    side: SideMemory,
    fact_id: str,
    stated: float | None,
    end: float,
    margin: float,
    states: PromptStates,
) -> Reason:
    """Return why a fact does not fire for a sentence that goes on."""
    if stated is not None:
        is_enough = stated >= side.gates.min_words_score
        return Reason.OTHER_FACT if is_enough else Reason.OTHER_STATEMENT
    if end < side.gates.min_end_cosine:
        return Reason.OTHER_END
    if fact_id not in side.filter_near({fact_id}, states.key_outputs):
        return Reason.OTHER_SUBJECT
    return Reason.LOW_MARGIN if margin < 1 else Reason.OTHER_FACT
