"""The columns: reliability, generality and locality, each as four measures (field.md, section 2).

prob: mean NLL of the wanted answer below that of its rival. tokens: share of the answer's tokens
that are the argmax under its own prefix. strict: all of them are. generation: the greedy answer up
to its natural stop is the wanted one, after normalising.

Of locality, prob sets the neighbour's own answer against the edit's target; the other three are
agreement with what the model said before any edit.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol, TypeVar

from kedit_daemon.bench.dataset import BenchRecord
from kedit_daemon.bench.scoring import Forced, Wanted, continued, forced
from memory.facts import Fact
from memory.model.editable import EditableModel
from memory.model.generate import Overlay, answers
from policies.probe import longest_target, same

T = TypeVar("T")
COLUMNS = ("reliability", "generality", "locality")
MEASURES = ("prob", "tokens", "strict", "generation")
RECORDS_AT_ONCE = 200
COHORT = 100
NEIGHBOUR_TOKENS = 4  # of an unedited answer that are compared


class Track(Protocol):
    """Goes through items, and may show how far it is."""

    def __call__(self, items: Sequence[T], what: str, /) -> Iterable[T]: ...


@dataclass(frozen=True)
class Subject:
    """What is measured: the model as it stands, what is laid over it, what prompts become."""

    model: EditableModel
    overlay: Overlay | None = None
    framed: Callable[[Fact, str], str] = lambda _fact, prompt: prompt


@dataclass(frozen=True)
class Before:
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


Scores = dict[str, Score | None]
"""A record's score in each of COLUMNS; None where it has no such question."""


@dataclass(frozen=True)
class _Question:
    prompt: str
    wanted: tuple[int, ...]
    answer: str
    pair: tuple[str, str] | None  # the first shall be the likelier one


def _chunks(records: Sequence[T]) -> list[Sequence[T]]:
    at = range(0, len(records), RECORDS_AT_ONCE)
    return [records[start : start + RECORDS_AT_ONCE] for start in at]


def _room(model: EditableModel, records: Sequence[BenchRecord]) -> int:
    return longest_target(model, [record.fact for record in records])


def before_edits(
    model: EditableModel, records: Sequence[BenchRecord], track: Track
) -> list[Before]:
    """The neighbours' reference, to be taken from the model before any edit."""
    result = []
    for chunk in track(_chunks(records), "before"):
        prompts = [n.prompt for record in chunk for n in record.neighbours]
        encoded = [tuple(model.encode(prompt)) for prompt in prompts]
        tokens = iter(continued(model, encoded, NEIGHBOUR_TOKENS))
        said = iter(answers(model, prompts, _room(model, chunk)))
        for record in chunk:
            first = tuple(next(tokens) for _ in record.neighbours)
            result.append(Before(first, tuple(next(said) for _ in record.neighbours)))
    return result


def measure(
    subject: Subject, records: Sequence[BenchRecord], before: Sequence[Before], track: Track
) -> list[Scores]:
    """Every record's scores, in the order of the stream."""
    pairs = list(zip(records, before, strict=True))
    return [s for chunk in track(_chunks(pairs), "measuring") for s in _scores(subject, chunk)]


def _scores(subject: Subject, chunk: Sequence[tuple[BenchRecord, Before]]) -> list[Scores]:
    asked = [_questions(subject, record, before) for record, before in chunk]
    flat = [q for columns in asked for group in columns.values() for q in group]
    rows = _forced(subject, flat)
    room = _room(subject.model, [record for record, _ in chunk])
    said = answers(subject.model, [q.prompt for q in flat], room, subject.overlay)
    scored = iter([_score(subject, q, rows, text) for q, text in zip(flat, said, strict=True)])
    return [
        {name: mean_score([next(scored) for _ in group]) for name, group in columns.items()}
        for columns in asked
    ]


def _questions(subject: Subject, record: BenchRecord, before: Before) -> dict[str, list[_Question]]:
    fact, model = record.fact, subject.model
    rivals = (fact.target, record.true_target) if record.true_target is not None else None

    def of_fact(prompt: str) -> _Question:
        framed = subject.framed(fact, prompt)
        return _Question(framed, _ids(model, framed, fact.target), fact.target, rivals)

    near = []
    for neighbour, tokens, said in zip(
        record.neighbours, before.tokens, before.answers, strict=True
    ):
        old = neighbour.answer
        pair = None if old is None or same(old, fact.target) else (old, fact.target)
        near.append(_Question(subject.framed(fact, neighbour.prompt), tokens, said, pair))
    again = [of_fact(prompt) for prompt in record.paraphrases]
    return dict(zip(COLUMNS, ([of_fact(fact.question)], again, near), strict=True))


def _ids(model: EditableModel, prompt: str, answer: str) -> tuple[int, ...]:
    return tuple(model.encode_target(prompt, answer))


def _forced(subject: Subject, questions: Sequence[_Question]) -> dict[Wanted, Forced]:
    """Every row that the questions need, each scored once."""
    model = subject.model
    rows: dict[Wanted, None] = {}
    for q in questions:
        prompt = tuple(model.encode(q.prompt))
        wanted = [q.wanted, *(_ids(model, q.prompt, answer) for answer in q.pair or ())]
        rows |= {Wanted(prompt, ids): None for ids in wanted}
    return dict(zip(rows, forced(model, list(rows), subject.overlay), strict=True))


def _score(subject: Subject, q: _Question, rows: dict[Wanted, Forced], said: str) -> Score:
    model = subject.model
    prompt = tuple(model.encode(q.prompt))
    right = rows[Wanted(prompt, q.wanted)].right
    prob = None
    if q.pair is not None:
        better, worse = (rows[Wanted(prompt, _ids(model, q.prompt, a))].loss for a in q.pair)
        prob = float(better < worse)
    return Score(prob, fmean(right), float(all(right)), float(same(said, q.answer)))


def mean_score(scores: Sequence[Score]) -> Score | None:
    """The mean of some scores, `prob` over those that have one; None of none."""
    if not scores:
        return None
    return Score(
        mean_known([s.prob for s in scores]),
        fmean(s.tokens for s in scores),
        fmean(s.strict for s in scores),
        fmean(s.generation for s in scores),
    )


def mean_known(values: Sequence[float | None]) -> float | None:
    """The mean of those that are there."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def columns(results: Sequence[Scores]) -> dict[str, dict[str, float | None]]:
    """The means over the records that have such questions, by column and measure."""
    table = {}
    for name in COLUMNS:
        mean = mean_score([score for r in results if (score := r[name]) is not None])
        table[name] = {m: None if mean is None else getattr(mean, m) for m in MEASURES}
    return table


def retention(results: Sequence[Scores]) -> list[dict[str, float | int]]:
    """Reliability at the end of the stream, by cohort in the stream's order, oldest first."""
    found = []
    for start in range(0, len(results), COHORT):
        cohort = results[start : start + COHORT]
        mean = mean_score([score for r in cohort if (score := r["reliability"]) is not None])
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
