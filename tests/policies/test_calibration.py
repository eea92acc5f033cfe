from collections.abc import Collection, Mapping
from dataclasses import replace

import pytest
from editing_home import seat
from tiny_models import SENTENCES
from torch import Tensor

from memory.errors import KeditError
from memory.model.editable import EditableModel
from memory.model.statistics import LayerStatistics, collect_statistics
from policies.calibration import (
    MAX_END_LAYERS,
    MAX_WINDOW,
    MAX_WINDOW_STARTS,
    SCORE_SPREAD,
    Candidate,
    EditQuality,
    SiteSearch,
    choose_candidate,
    format_layers,
    list_end_layers,
    list_windows,
)
from policies.edit_site import make_default_site

FACTS = [seat(n, city) for n, city in enumerate(("Rome", "Oslo", "Lima"))]


def candidate(*shares: float, norm: float = 2.0, clamp: float = 4.0) -> Candidate:
    site = replace(make_default_site(4), clamp=clamp)
    return Candidate("quality", site, 0.5, 1.0, EditQuality(*shares, norm))


@pytest.mark.parametrize("layers", [1, 2, 4, 6, 32, 80])
def test_groups_are_consecutive_few_and_where_they_belong(layers: int) -> None:
    groups, ends = list_windows(layers), list_end_layers(layers)
    assert 0 < len(groups) <= MAX_WINDOW_STARTS * MAX_WINDOW and 0 < len(ends) <= MAX_END_LAYERS
    assert len(set(groups)) == len(groups)
    for group in groups:
        assert group == tuple(range(group[0], group[0] + len(group)))
        assert group[0] >= 0 and group[-1] < max(1, round(layers * 2 / 3))
    assert all(layers // 3 <= n < layers for n in ends)
    assert groups[0] == (0,) and {len(g) for g in groups} == set(
        range(1, min(MAX_WINDOW, max(1, round(layers * 2 / 3))) + 1)
    )


def test_the_score_is_harmonic() -> None:
    assert EditQuality(1.0, 1.0, 1.0, 1.2).score == 1.0
    assert EditQuality(1.0, 0.5, 0.25, 1.2).score == pytest.approx(3 / 7)
    assert EditQuality(1.0, 1.0, 0.0, 1.0).score == 0.0


def test_the_choice_is_the_score_and_among_ties_the_smaller_norm() -> None:
    high, close = candidate(1.0, 1.0, 1.0, norm=5.0), candidate(1.0, 1.0, 0.96, norm=1.5)
    low = candidate(1.0, 0.5, 1.0, norm=1.0)
    assert close.quality and 1 - close.quality.score < SCORE_SPREAD / 4
    assert choose_candidate([low, high, close], 16) is close
    assert choose_candidate([low, high, close], 1600) is high
    assert choose_candidate([low, high], 16) is high
    unmeasured = replace(high, quality=None)
    assert choose_candidate([unmeasured, low], 16) is low


def test_a_search_that_found_nothing_is_an_error() -> None:
    for candidates in ([], [candidate(1.0, 0.0, 1.0)], [replace(candidate(1, 1, 1), quality=None)]):
        with pytest.raises(KeditError, match="pilot facts") as caught:
            choose_candidate(candidates, 16)
        assert (caught.value.code, "--pilot" in caught.value.hint) == ("calibration", True)


class Asked:
    """Scores weights as a test wants it, and remembers what it was given."""

    def __init__(self, liked: set[int]) -> None:
        self.liked, self.given = liked, list[set[int]]()

    def __call__(self, deltas: Mapping[int, Tensor]) -> EditQuality:
        self.given.append(set(deltas))
        size = sum(float(delta.norm()) for delta in deltas.values())
        share = 1.0 if set(deltas) == self.liked else 0.5
        return EditQuality(1.0, share, 1.0, 1.0 + size)


def search(model: EditableModel, liked: set[int]) -> SiteSearch:
    def measured(layers: Collection[int]) -> Mapping[int, LayerStatistics]:
        return collect_statistics(model, SENTENCES, layers)

    base = replace(make_default_site(model.layer_count), target_steps=8)
    norms = {
        n: s.median_norm
        for n, s in collect_statistics(model, SENTENCES, (), range(model.layer_count)).items()
    }
    return SiteSearch(model, base, FACTS, Asked(liked), norms, measured)


def test_the_search_goes_through_its_stages_and_takes_the_best(model: EditableModel) -> None:
    before, progress = model.weights_hash(range(model.layer_count)), list[str]()
    found = search(model, {0, 1, 2, 3})
    chosen = found.run_stages(progress.append)
    assert len(progress) <= found.max_units
    stages = [c.stage for c in found.candidates]
    order = ["screening", "start", "quality", "combination", "clamp"]
    assert list(dict.fromkeys(stages)) == order
    screened = [c for c in found.candidates if c.stage == "screening"]
    assert [c.site.layers for c in screened] == [
        *list_windows(model.layer_count),
        *((n,) for n in list_end_layers(model.layer_count)),
    ]
    assert all(c.loss is not None and c.quality is None for c in screened)
    assert chosen in found.candidates and chosen is choose_candidate(found.candidates, len(FACTS))
    assert model.weights_hash(range(model.layer_count)) == before


def test_end_layers_that_help_stand_above_the_subject_and_join_later(model: EditableModel) -> None:
    found = search(model, {0, 3})
    found.run_stages(lambda _what: None)
    joined = [c for c in found.candidates if c.stage == "combination"]
    assert joined
    for c in joined:
        assert c.site.subject_layers and min(c.site.end_layers) > max(c.site.subject_layers)
        assert 0 < c.site.end_from < c.site.target_steps
        assert c.site.end_prior >= c.site.prior
        assert set(c.as_dict()) > {"prior", "ridge", "clamp", "loss", "reached", "score"}


def test_the_changes_of_a_tried_site_come_back(model: EditableModel) -> None:
    found = search(model, {2})
    chosen = found.run_stages(lambda _what: None)
    assert chosen.quality and set(found.solve_deltas(chosen.site)) == set(chosen.site.layers)
    size = sum(float(delta.norm()) for delta in found.solve_deltas(chosen.site).values())
    assert chosen.quality.norm_ratio == pytest.approx(1.0 + size)


def test_both_kinds_of_layers_are_named() -> None:
    site = replace(make_default_site(6), subject_layers=(1, 2), end_layers=(3,))
    assert format_layers(site) == "subject 1, 2 + end 3"
    assert format_layers(replace(site, subject_layers=())) == "end 3"
