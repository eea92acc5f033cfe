"""Columns of the bench: reliability, generality and locality, each as four measures.

prob: mean NLL of the wanted answer is below that of its rival. tokens: share of the answer's tokens
that are the argmax under its own prefix. strict: all of them are. generation: the greedy answer, up
to its natural stop and normalized, is the wanted one. Of several right answers the best counts.

For locality, prob compares the neighbour's own answer with the edit's target; the other three are
agreement with the model's answers before any edit.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol, TypeVar

from kedit_daemon.bench.dataset import BenchRecord
from kedit_daemon.bench.scoring import continue_greedily
from memory.facts import Fact, Neighbour
from memory.model.editable import EditableModel
from memory.model.generate import Overlay, generate_answers
from memory.model.scoring import AnswerScore, PromptAnswer, score_answers
from policies.probe import count_answer_tokens, is_same_answer

T = TypeVar("T")
COLUMNS = ("reliability", "generality", "locality")
MEASURES = ("prob", "tokens", "strict", "generation")
CHUNK_RECORDS = 200
COHORT_SIZE = 100
NEIGHBOUR_TOKENS = 4  # tokens of an unedited answer that are compared


class ProgressTracker(Protocol):
    """Iterates over items, and may show the progress."""

    def __call__(self, items: Sequence[T], what: str, /) -> Iterable[T]: ...


@dataclass(frozen=True)
class MeasuredModel:
    """Subject of a measurement: the model as it is, an overlay on it, and a frame for prompts."""

    model: EditableModel
    overlay: Overlay | None = None
    frame_prompt: Callable[[Fact, str], str] = lambda _fact, prompt: prompt


@dataclass(frozen=True)
class BaseAnswers:
    """The unedited model's answers to a record's neighbours: first tokens, and whole answers."""

    tokens: tuple[tuple[int, ...], ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """Score in one of COLUMNS, as means over its questions; `prob` is None without a rival."""

    prob: float | None
    tokens: float
    strict: float
    generation: float


RecordScores = dict[str, Score | None]
"""A record's score in each of COLUMNS; None if it has no such question."""


@dataclass(frozen=True)
class _Question:
    prompt: str
    answers: tuple[str, ...]  # each of them is right
    wanted: tuple[PromptAnswer, ...]  # the rows of these, or that of an unedited answer
    likelier: tuple[PromptAnswer, ...]  # one of these should be likelier than the rival
    rival: PromptAnswer | None


def _split_chunks(records: Sequence[T]) -> list[Sequence[T]]:
    starts = range(0, len(records), CHUNK_RECORDS)
    return [records[start : start + CHUNK_RECORDS] for start in starts]


def _limit_answer_tokens(model: EditableModel, records: Sequence[BenchRecord]) -> int:
    return count_answer_tokens(model, [record.fact for record in records])


def read_base_answers(
    model: EditableModel, records: Sequence[BenchRecord], track: ProgressTracker
) -> list[BaseAnswers]:
    """Read the reference answers to the neighbours, from the model before any edit."""
    result = []
    for chunk in track(_split_chunks(records), "before"):
        prompts = [n.prompt for record in chunk for n in record.neighbours]
        encoded = [tuple(model.encode(prompt)) for prompt in prompts]
        tokens = iter(continue_greedily(model, encoded, NEIGHBOUR_TOKENS))
        answers = iter(generate_answers(model, prompts, _limit_answer_tokens(model, chunk)))
        for record in chunk:
            first = tuple(next(tokens) for _ in record.neighbours)
            result.append(BaseAnswers(first, tuple(next(answers) for _ in record.neighbours)))
    return result


def measure_records(
    subject: MeasuredModel,
    records: Sequence[BenchRecord],
    before: Sequence[BaseAnswers],
    track: ProgressTracker,
) -> list[RecordScores]:
    """Score every record, in the order of the stream."""
    chunks = _split_chunks(list(zip(records, before, strict=True)))
    return [s for chunk in track(chunks, "measuring") for s in _score_chunk(subject, chunk)]


def _score_chunk(
    subject: MeasuredModel, chunk: Sequence[tuple[BenchRecord, BaseAnswers]]
) -> list[RecordScores]:
    by_record = [_build_questions(subject, record, before) for record, before in chunk]
    questions = [q for columns in by_record for group in columns.values() for q in group]
    rows = list(dict.fromkeys(row for q in questions for row in _list_rows(q)))
    by_row = dict(zip(rows, score_answers(subject.model, rows, subject.overlay), strict=True))
    limit = _limit_answer_tokens(subject.model, [record for record, _ in chunk])
    texts = generate_answers(subject.model, [q.prompt for q in questions], limit, subject.overlay)
    pairs = zip(questions, texts, strict=True)
    scores = iter([_score_question(q, by_row, text) for q, text in pairs])
    return [
        {name: average_scores([next(scores) for _ in group]) for name, group in columns.items()}
        for columns in by_record
    ]


def _build_questions(
    subject: MeasuredModel, record: BenchRecord, before: BaseAnswers
) -> dict[str, list[_Question]]:
    fact, model = record.fact, subject.model

    def encode_rows(
        prompt: str, texts: Sequence[str], join: str | None = None
    ) -> tuple[PromptAnswer, ...]:
        ids = tuple(model.encode(prompt))
        encoded = [model.encode_target(prompt, text, join) for text in texts]
        return tuple(PromptAnswer(ids, tuple(tokens)) for tokens in encoded)

    def build_question(prompt: str) -> _Question:
        framed = subject.frame_prompt(fact, prompt)
        wanted = encode_rows(framed, fact.targets, fact.join)
        if record.true_target is None:
            return _Question(framed, fact.targets, wanted, (), None)
        (rival,) = encode_rows(framed, [record.true_target], fact.join)
        return _Question(framed, fact.targets, wanted, wanted, rival)

    def build_near(near: Neighbour, tokens: tuple[int, ...], answer: str) -> _Question:
        framed, old = subject.frame_prompt(fact, near.prompt), near.answer
        wanted = (PromptAnswer(tuple(model.encode(framed)), tokens),)
        if old is None or is_same_answer(old, fact.target):
            return _Question(framed, (answer,), wanted, (), None)
        likelier, rival = encode_rows(framed, [old, fact.target])
        return _Question(framed, (answer,), wanted, (likelier,), rival)

    references = zip(record.neighbours, before.tokens, before.answers, strict=True)
    near = [build_near(*reference) for reference in references]
    rephrased = [build_question(prompt) for prompt in record.paraphrases]
    return dict(zip(COLUMNS, ([build_question(fact.question)], rephrased, near), strict=True))


def _list_rows(q: _Question) -> list[PromptAnswer]:
    return [*q.wanted, *q.likelier, *([] if q.rival is None else [q.rival])]


def _score_question(q: _Question, rows: Mapping[PromptAnswer, AnswerScore], text: str) -> Score:
    """Score an answer; of several right ones, the one that the model is nearest to."""
    hits = [rows[row].token_hits for row in q.wanted]
    losses = [rows[row].loss for row in q.likelier]
    prob = None if q.rival is None else float(min(losses) < rows[q.rival].loss)
    stated = any(is_same_answer(text, answer) for answer in q.answers)
    return Score(prob, max(map(fmean, hits)), float(any(map(all, hits))), float(stated))


def average_scores(scores: Sequence[Score]) -> Score | None:
    """Average scores, `prob` over those that have one; None without scores."""
    if not scores:
        return None
    return Score(
        average_known([s.prob for s in scores]),
        fmean(s.tokens for s in scores),
        fmean(s.strict for s in scores),
        fmean(s.generation for s in scores),
    )


def average_known(values: Sequence[float | None]) -> float | None:
    """Average the values that are not None."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def average_columns(results: Sequence[RecordScores]) -> dict[str, dict[str, float | None]]:
    """Average over the records that have such questions, by column and measure."""
    table = {}
    for name in COLUMNS:
        mean = average_scores([score for r in results if (score := r[name]) is not None])
        table[name] = {m: None if mean is None else getattr(mean, m) for m in MEASURES}
    return table


def compute_retention(results: Sequence[RecordScores]) -> list[dict[str, float | int]]:
    """Average reliability at the end of the stream by cohort, oldest first."""
    cohorts = []
    for start in range(0, len(results), COHORT_SIZE):
        cohort = results[start : start + COHORT_SIZE]
        mean = average_scores([score for r in cohort if (score := r["reliability"]) is not None])
        if mean is not None:
            shares = {"strict": mean.strict, "generation": mean.generation}
            cohorts.append({"first": start, "facts": len(cohort), **shares})
    return cohorts
