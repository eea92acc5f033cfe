import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any

from editing_home import seat
from pydantic import TypeAdapter
from tiny_models import SENTENCES
from torch import Tensor

from memory.model.editable import EditableModel
from memory.model.statistics import LayerStatistics, collect_statistics
from policies.calibration import (
    EditQuality,
    choose_candidate,
    list_end_layers,
    list_priors,
    list_windows,
)
from policies.edit_site import make_default_site
from policies.site_search import SearchWork, SiteSearch

FACTS = [seat(n, city) for n, city in enumerate(("Rome", "Oslo", "Lima", "Bonn", "Kiev"))]
LONG = 1e9  # seconds


class Examiner:
    """Scores weights as a test wants it, and remembers what it was given."""

    def __init__(self, liked: set[int], wrecking: Collection[int] = ()) -> None:
        self.liked, self.wrecking = liked, set(wrecking)
        self.given: list[tuple[set[int], int]] = []

    def __call__(self, deltas: Mapping[int, Tensor], facts: int) -> EditQuality:
        self.given.append((set(deltas), facts))
        size = sum(float(delta.norm()) for delta in deltas.values())
        share = 1.0 if set(deltas) == self.liked else 0.5
        perplexity = 14.0 if self.wrecking & set(deltas) else 1.0
        return EditQuality(1.0, share, 1.0, 1.0 + size, perplexity)


def search(
    model: EditableModel,
    examiner: Examiner,
    work: SearchWork | None = None,
    rate: float = 0.3,
    **given: Any,
) -> SiteSearch:
    def measured(layers: Collection[int]) -> Mapping[int, LayerStatistics]:
        return collect_statistics(model, SENTENCES, layers)

    base = replace(make_default_site(model.layer_count), target_steps=8, target_rate=rate)
    read = collect_statistics(model, SENTENCES, (), range(model.layer_count))
    norms = {n: s.median_norm for n, s in read.items()}
    kept = SearchWork() if work is None else work
    return SiteSearch(model, base, FACTS, examiner, norms, measured, kept, **given)


def test_the_search_goes_through_its_stages_and_takes_the_best(model: EditableModel) -> None:
    before, progress = model.weights_hash(range(model.layer_count)), list[str]()
    found = search(model, Examiner({0, 1}))
    chosen = found.run_stages(LONG, progress.append)
    candidates = found.work.candidates
    stages = list(dict.fromkeys(c.stage for c in candidates))
    assert stages[:4] == ["screening", "halving", "final", "start"]
    screened = {c.site.layers for c in candidates if c.stage == "screening"}
    ends = {(n,) for n in list_end_layers(model.layer_count)}
    assert screened == {*list_windows(model.layer_count)} | ends
    assert {c.facts for c in candidates if c.stage == "screening"} == {4}
    assert {c.facts for c in candidates if c.stage == "final"} == {len(FACTS)}
    assert chosen.site.layers == (0, 1) and chosen is choose_candidate(candidates)
    assert chosen.facts == len(FACTS)
    assert any(line.startswith("final: subject 0, 1, λ ") for line in progress)
    assert model.weights_hash(range(model.layer_count)) == before


def test_layers_that_wreck_the_model_are_left_at_the_first_solve(model: EditableModel) -> None:
    examiner = Examiner({0}, wrecking={1})
    chosen = search(model, examiner).run_stages(LONG)
    assert 1 not in chosen.site.layers
    solves = [layers for layers, _ in examiner.given if 1 in layers]
    assert all(solves.count(layers) == 1 for layers in solves if layers != {1})
    assert solves.count({1}) == 2  # as a subject's layer, and as an end layer


def test_priors_are_climbed_as_long_as_the_score_rises(model: EditableModel) -> None:
    found = search(model, Examiner({0}))
    found.run_stages(LONG)
    middle = list_priors(model.weight(0).shape[1])[2]
    halved = [c for c in found.work.candidates if c.stage == "halving"]
    priors = [c.site.prior for c in halved if c.site.layers == (0,)]
    # Their scores are equal: one weaker and one stronger λ are tried.
    assert len(priors) == 3 and priors[1] < priors[0] == middle < priors[2]
    assert {c.site.prior for c in found.work.candidates if c.stage == "screening"} == {middle}


def test_a_search_ends_in_time_with_a_choice(model: EditableModel) -> None:
    hours = iter(range(10_000))
    found = search(model, Examiner({0, 1}), clock=lambda: float(next(hours)))
    chosen = found.run_stages(4.0)
    assert chosen.facts == len(FACTS)  # the first of a stage is tried in any case
    assert len({c.site.layers for c in found.work.candidates}) < 5


def test_a_search_that_was_cut_off_is_taken_up(model: EditableModel) -> None:
    saved: list[str] = []

    def save(work: SearchWork) -> None:
        saved.append(json.dumps(asdict(work)))

    whole = search(model, Examiner({0, 1}), save_work=save)
    chosen = whole.run_stages(LONG)
    work = TypeAdapter(SearchWork).validate_json(saved[len(saved) // 2])
    known = len(work.candidates)
    examiner = Examiner({0, 1})
    again = search(model, examiner, work)
    assert again.run_stages(LONG) == chosen
    assert again.work.candidates == whole.work.candidates
    assert len(examiner.given) == len(saved) - known


def test_end_layers_that_help_stand_above_the_subject_and_join_later(model: EditableModel) -> None:
    found = search(model, Examiner({0, 3}), rate=0.01)  # no target is reached in time
    found.run_stages(LONG)
    joined = [c for c in found.work.candidates if c.stage == "combination"]
    assert joined
    for c in joined:
        assert c.site.subject_layers and min(c.site.end_layers) > max(c.site.subject_layers)
        assert 0 < c.site.end_from < c.site.target_steps
        assert c.site.end_prior >= c.site.prior


def test_the_changes_of_a_tried_site_come_back(model: EditableModel) -> None:
    found = search(model, Examiner({2}))
    chosen = found.run_stages(LONG)
    deltas = found.solve_deltas(chosen.site)
    assert set(deltas) == set(chosen.site.layers) == set(found.compute_anchors(chosen.site))
    size = sum(float(delta.norm()) for delta in deltas.values())
    assert chosen.quality.norm_ratio == 1.0 + size
