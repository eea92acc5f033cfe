from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from kedit_daemon.bench.dataset import BenchRecord
from kedit_daemon.bench.measure import (
    COHORT_SIZE,
    BaseAnswers,
    MeasuredModel,
    RecordScores,
    Score,
    average_columns,
    compute_retention,
    measure_records,
    read_base_answers,
)
from memory.facts import Fact, Neighbour
from memory.model.editable import EditableModel
from memory.model.generate import generate_answers

UNTOLD = {"prob": None, "tokens": None, "strict": None, "generation": None}


def straight(items: Sequence[Any], _what: str, /) -> Iterable[Any]:
    return items


def record(number: int, target: str, truth: str | None = "Rome") -> BenchRecord:
    near = (
        Neighbour(f"The seat of country {number + 20} is", truth),
        Neighbour(f"In country {number} the seat is", None),
    )
    asked = Fact(f"country {number}", "The seat of {} is", target)
    return BenchRecord(asked, truth, (f"The seat of the old country {number} is",), near)


def measured(
    subject: MeasuredModel, records: list[BenchRecord], before: list[BaseAnswers]
) -> list[RecordScores]:
    return measure_records(subject, records, before, straight)


def test_an_unedited_model_agrees_with_itself(model: EditableModel) -> None:
    records = [record(n, "Oslo") for n in range(5)]
    before = read_base_answers(model, records, straight)
    table = average_columns(measured(MeasuredModel(model), records, before))
    found = {m: table["locality"][m] for m in ("tokens", "strict", "generation")}
    assert found == {"tokens": 1.0, "strict": 1.0, "generation": 1.0}


def test_locality_is_agreement_with_before_and_not_with_the_label(model: EditableModel) -> None:
    """Before: some answer. After: other weights, whose answers differ though no label was met."""
    records = [record(n, "Oslo") for n in range(5)]
    before = read_base_answers(model, records, straight)
    torch.manual_seed(1)
    shift = {2: 3 * model.base_weight(2).std() * torch.randn_like(model.base_weight(2))}
    model.set_deltas(shift)
    score = measured(MeasuredModel(model), records, before)
    table = average_columns(score)["locality"]
    prompts = [n.prompt for r in records for n in r.neighbours]
    said, was = generate_answers(model, prompts, 20), [a for b in before for a in b.answers]
    assert table["generation"] is not None and table["generation"] < 1
    assert sum(a == b for a, b in zip(said, was, strict=True)) < len(was)
    assert table["strict"] is not None and table["tokens"] is not None
    assert table["strict"] < table["tokens"] < 1
    model.set_deltas({})


def test_of_several_right_answers_the_best_counts(model: EditableModel) -> None:
    def reliability(*targets: str, rival: str) -> Score:
        one = record(1, targets[0], rival)
        one = replace(one, fact=replace(one.fact, other_targets=targets[1:]))
        before = read_base_answers(model, [one], straight)
        score = measured(MeasuredModel(model), [one], before)[0]["reliability"]
        assert score is not None
        return score

    names = ["Oslo", "Lima", "Cairo"]
    wins = {n: sum(reliability(n, rival=r).prob or 0 for r in names if r != n) for n in names}
    worst, middle, best = sorted(names, key=lambda name: wins[name])
    assert reliability(worst, rival=middle).prob == 0
    assert reliability(worst, best, rival=middle).prob == 1
    assert reliability(best, worst, rival=middle).prob == 1
    assert reliability(worst, middle, rival=best).prob == 0


def test_strict_wants_every_token_and_tokens_gives_the_share(model: EditableModel) -> None:
    own = record(1, "Oslo")
    before = read_base_answers(model, [own], straight)
    tokens = before[0].tokens
    wrong = tuple((first, *((t + 1) % 300 + 50 for t in rest)) for first, *rest in tokens)
    (score,) = measured(MeasuredModel(model), [own], [BaseAnswers(wrong, before[0].answers)])
    locality = score["locality"]
    assert locality is not None
    assert locality.strict == 0.0
    assert 1 / len(tokens[0]) <= locality.tokens < 1
    assert locality.generation == 1.0


def test_prob_compares_with_the_true_target_and_is_null_without(model: EditableModel) -> None:
    records = [record(1, "Oslo", "Lima"), record(1, "Lima", "Oslo"), record(1, "Oslo", None)]
    before = read_base_answers(model, records, straight)
    one, other, without = measured(MeasuredModel(model), records, before)
    for column in ("reliability", "generality", "locality"):
        a, b, c = one[column], other[column], without[column]
        assert a is not None and b is not None and c is not None
        assert a.prob is not None and b.prob is not None and c.prob is None
        assert a.prob + b.prob == 1.0  # exactly one of the two is the likelier answer


def test_the_neighbours_answer_has_to_beat_the_target(model: EditableModel) -> None:
    """In locality the sides are turned round: the old answer is the one that shall be likelier."""
    same = Neighbour("The seat of country 1 is", "Lima")
    asked = BenchRecord(Fact("country 1", "The seat of {} is", "Oslo"), "Lima", (), (same,))
    before = read_base_answers(model, [asked], straight)
    (score,) = measured(MeasuredModel(model), [asked], before)
    reliable, local = score["reliability"], score["locality"]
    assert reliable is not None and local is not None
    assert reliable.prob is not None and local.prob == 1 - reliable.prob


def test_every_question_is_framed_but_the_reference_is_not(model: EditableModel) -> None:
    records, framed = [record(1, "Oslo")], list[str]()

    def frame(fact: Fact, prompt: str) -> str:
        framed.append(prompt)
        return f"{fact.question} {fact.target}. {prompt}"

    before = read_base_answers(model, records, straight)
    score = measured(MeasuredModel(model, frame_prompt=frame), records, before)[0]
    near = [n.prompt for n in records[0].neighbours]
    assert sorted(framed) == sorted([records[0].fact.question, *records[0].paraphrases, *near])
    bare = measured(MeasuredModel(model), records, before)[0]
    assert score["locality"] != bare["locality"]


def test_the_mean_is_over_facts_not_over_questions() -> None:
    one, two = Score(1.0, 1.0, 1.0, 1.0), Score(None, 0.5, 0.0, 0.0)
    results: list[RecordScores] = [
        {"reliability": one, "generality": one, "locality": None},
        {"reliability": two, "generality": None, "locality": None},
    ]
    assert average_columns(results) == {
        "reliability": {"prob": 1.0, "tokens": 0.75, "strict": 0.5, "generation": 0.5},
        "generality": {"prob": 1.0, "tokens": 1.0, "strict": 1.0, "generation": 1.0},
        "locality": UNTOLD,
    }


def test_retention_is_by_cohort_in_the_order_of_the_stream() -> None:
    held, lost = Score(None, 1.0, 1.0, 1.0), Score(None, 0.5, 0.0, 0.0)
    results: list[RecordScores] = [
        {"reliability": score, "generality": None, "locality": None}
        for score in [
            *[lost] * COHORT_SIZE,
            *[held] * (COHORT_SIZE // 2),
            *[lost] * (COHORT_SIZE // 2),
            held,
        ]
    ]
    assert compute_retention(results) == [
        {"first": 0, "facts": COHORT_SIZE, "strict": 0.0, "generation": 0.0},
        {"first": COHORT_SIZE, "facts": COHORT_SIZE, "strict": 0.5, "generation": 0.5},
        {"first": 2 * COHORT_SIZE, "facts": 1, "strict": 1.0, "generation": 1.0},
    ]


def test_an_overlay_reaches_all_measures(model: EditableModel) -> None:
    """Whatever is laid over the weights is there when tokens are forced and when they are made."""
    records = [record(1, "Oslo")]
    before = read_base_answers(model, records, straight)

    def away(_inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        return outputs + 1e3 * torch.linspace(-1, 1, outputs.shape[-1])

    subject = MeasuredModel(model, overlay=lambda _places: model.tap_layers({2: away}))
    score = measured(subject, records, before)[0]["locality"]
    assert score is not None
    assert (score.strict, score.generation) == (0.0, 0.0)
    assert score.tokens < 1


def test_a_neighbour_with_the_new_answer_has_no_pair(model: EditableModel) -> None:
    records = [record(1, "Rome")]  # whose neighbour's own answer is Rome, too
    subject = MeasuredModel(model, None, lambda _fact, prompt: prompt)
    scores = measured(subject, records, read_base_answers(model, records, straight))
    assert average_columns(scores)["locality"]["prob"] is None
