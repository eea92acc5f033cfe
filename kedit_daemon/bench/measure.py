"""The columns: reliability, generality and locality, each as four measures (field.md, section 2).

prob: mean NLL of the wanted answer below that of its rival. tokens: share of the answer's tokens
that are the argmax under its own prefix. strict: all of them are. generation: the greedy answer up
to its natural stop is the wanted one, after normalizing.

Of locality, prob sets the neighbour's own answer against the edit's target; the other three are
agreement with what the model said before any edit.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol, TypeVar

from kedit_daemon.bench.dataset import BenchRecord
from kedit_daemon.bench.scoring import AnswerScore, PromptAnswer, continue_greedily, score_answers
from memory.facts import Fact
from memory.model.editable import EditableModel
from memory.model.generate import Overlay, generate_answers
from policies.probe import count_answer_tokens, is_same_answer

T = TypeVar("T")
COLUMNS = ("reliability", "generality", "locality")
MEASURES = ("prob", "tokens", "strict", "generation")
CHUNK_RECORDS = 200
COHORT_SIZE = 100
NEIGHBOUR_TOKENS = 4  # of an unedited answer that are compared


class ProgressTracker(Protocol):
    """Goes through items, and may show how far it is."""

    def __call__(self, items: Sequence[T], what: str, /) -> Iterable[T]: ...


@dataclass(frozen=True)
class MeasuredModel:
    """What is measured: the model as it stands, what is laid over it, what prompts become."""

    model: EditableModel
    overlay: Overlay | None = None
    frame_prompt: Callable[[Fact, str], str] = lambda _fact, prompt: prompt


@dataclass(frozen=True)
class BaseAnswers:
    """What the unedited model says to a record's neighbours: first tokens, and whole answers."""

    tokens: tuple[tuple[int, ...], ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """One of COLUMNS, as means of its questions; `prob` is None where there is no rival."""

    prob: float | None
    tokens: float
    strict: float
    generation: float


RecordScores = dict[str, Score | None]
"""A record's score in each of COLUMNS; None where it has no such question."""


@dataclass(frozen=True)
class _Question:
    prompt: str
    wanted_ids: tuple[int, ...]
    answer: str
    rivals: tuple[str, str] | None  # the first shall be the likelier one


def _split_chunks(records: Sequence[T]) -> list[Sequence[T]]:
    at = range(0, len(records), CHUNK_RECORDS)
    return [records[start : start + CHUNK_RECORDS] for start in at]


def _limit_answer_tokens(model: EditableModel, records: Sequence[BenchRecord]) -> int:
    return count_answer_tokens(model, [record.fact for record in records])


def read_base_answers(
    model: EditableModel, records: Sequence[BenchRecord], track: ProgressTracker
) -> list[BaseAnswers]:
    """The neighbours' reference, to be taken from the model before any edit."""
    result = []
    for chunk in track(_split_chunks(records), "before"):
        prompts = [n.prompt for record in chunk for n in record.neighbours]
        encoded = [tuple(model.encode(prompt)) for prompt in prompts]
        tokens = iter(continue_greedily(model, encoded, NEIGHBOUR_TOKENS))
        said = iter(generate_answers(model, prompts, _limit_answer_tokens(model, chunk)))
        for record in chunk:
            first = tuple(next(tokens) for _ in record.neighbours)
            result.append(BaseAnswers(first, tuple(next(said) for _ in record.neighbours)))
    return result


def measure_records(
    subject: MeasuredModel,
    records: Sequence[BenchRecord],
    before: Sequence[BaseAnswers],
    track: ProgressTracker,
) -> list[RecordScores]:
    """Every record's scores, in the order of the stream."""
    pairs = list(zip(records, before, strict=True))
    return [
        s
        for chunk in track(_split_chunks(pairs), "measuring")
        for s in _score_chunk(subject, chunk)
    ]


def _score_chunk(
    subject: MeasuredModel, chunk: Sequence[tuple[BenchRecord, BaseAnswers]]
) -> list[RecordScores]:
    asked = [_build_questions(subject, record, before) for record, before in chunk]
    flat = [q for columns in asked for group in columns.values() for q in group]
    rows = _score_rows(subject, flat)
    room = _limit_answer_tokens(subject.model, [record for record, _ in chunk])
    said = generate_answers(subject.model, [q.prompt for q in flat], room, subject.overlay)
    scored = iter(
        [_score_question(subject, q, rows, text) for q, text in zip(flat, said, strict=True)]
    )
    return [
        {name: average_scores([next(scored) for _ in group]) for name, group in columns.items()}
        for columns in asked
    ]


def _build_questions(
    subject: MeasuredModel, record: BenchRecord, before: BaseAnswers
) -> dict[str, list[_Question]]:
    fact, model = record.fact, subject.model
    rivals = (fact.target, record.true_target) if record.true_target is not None else None

    def build_question(prompt: str) -> _Question:
        framed = subject.frame_prompt(fact, prompt)
        return _Question(framed, _encode_answer(model, framed, fact.target), fact.target, rivals)

    near = []
    for neighbour, tokens, said in zip(
        record.neighbours, before.tokens, before.answers, strict=True
    ):
        old = neighbour.answer
        pair = None if old is None or is_same_answer(old, fact.target) else (old, fact.target)
        near.append(_Question(subject.frame_prompt(fact, neighbour.prompt), tokens, said, pair))
    again = [build_question(prompt) for prompt in record.paraphrases]
    return dict(zip(COLUMNS, ([build_question(fact.question)], again, near), strict=True))


def _encode_answer(model: EditableModel, prompt: str, answer: str) -> tuple[int, ...]:
    return tuple(model.encode_target(prompt, answer))


def _score_rows(
    subject: MeasuredModel, questions: Sequence[_Question]
) -> dict[PromptAnswer, AnswerScore]:
    """Every row that the questions need, each scored once."""
    model = subject.model
    rows: dict[PromptAnswer, None] = {}
    for q in questions:
        prompt = tuple(model.encode(q.prompt))
        wanted = [
            q.wanted_ids,
            *(_encode_answer(model, q.prompt, answer) for answer in q.rivals or ()),
        ]
        rows |= {PromptAnswer(prompt, ids): None for ids in wanted}
    return dict(zip(rows, score_answers(model, list(rows), subject.overlay), strict=True))


def _score_question(
    subject: MeasuredModel, q: _Question, rows: dict[PromptAnswer, AnswerScore], said: str
) -> Score:
    model = subject.model
    prompt = tuple(model.encode(q.prompt))
    right = rows[PromptAnswer(prompt, q.wanted_ids)].token_hits
    prob = None
    if q.rivals is not None:
        better, worse = (
            rows[PromptAnswer(prompt, _encode_answer(model, q.prompt, a))].loss for a in q.rivals
        )
        prob = float(better < worse)
    return Score(prob, fmean(right), float(all(right)), float(is_same_answer(said, q.answer)))


def average_scores(scores: Sequence[Score]) -> Score | None:
    """The mean of some scores, `prob` over those that have one; None of none."""
    if not scores:
        return None
    return Score(
        average_known([s.prob for s in scores]),
        fmean(s.tokens for s in scores),
        fmean(s.strict for s in scores),
        fmean(s.generation for s in scores),
    )


def average_known(values: Sequence[float | None]) -> float | None:
    """The mean of those that are there."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def average_columns(results: Sequence[RecordScores]) -> dict[str, dict[str, float | None]]:
    """The means over the records that have such questions, by column and measure."""
    table = {}
    for name in COLUMNS:
        mean = average_scores([score for r in results if (score := r[name]) is not None])
        table[name] = {m: None if mean is None else getattr(mean, m) for m in MEASURES}
    return table


def compute_retention(results: Sequence[RecordScores]) -> list[dict[str, float | int]]:
    """Reliability at the end of the stream, by cohort in the stream's order, oldest first."""
    found = []
    for start in range(0, len(results), COHORT_SIZE):
        cohort = results[start : start + COHORT_SIZE]
        mean = average_scores([score for r in cohort if (score := r["reliability"]) is not None])
        if mean is not None:
            found.append(
                {
                    "first": start,
                    "facts": len(cohort),
                    "strict": mean.strict,
                    "generation": mean.generation,
                }
            )
    return found
