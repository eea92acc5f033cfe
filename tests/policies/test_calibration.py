import math
from dataclasses import replace

import pytest

from memory.errors import KeditError
from policies.calibration import (
    LEAST_WIDTH_IN_DEPTH,
    MAX_END_LAYERS,
    MAX_PERPLEXITY,
    MAX_WINDOW_STARTS,
    SCORE_SPREAD,
    WINDOW_WIDTHS,
    WRECKED_PERPLEXITY,
    Candidate,
    EditQuality,
    choose_candidate,
    format_layers,
    list_end_layers,
    list_priors,
    list_windows,
)
from policies.edit_site import make_default_site


def candidate(
    *shares: float, norm: float = 2.0, perplexity: float = 1.0, facts: int = 16
) -> Candidate:
    quality = EditQuality(*shares, norm, perplexity)
    return Candidate("final", make_default_site(4), facts, 0.5, 1.0, quality)


@pytest.mark.parametrize("layers", [1, 2, 4, 6, 30, 32, 80])
def test_groups_are_consecutive_few_and_where_they_belong(layers: int) -> None:
    groups, ends = list_windows(layers), list_end_layers(layers)
    assert 0 < len(groups) <= MAX_WINDOW_STARTS * len(WINDOW_WIDTHS)
    assert 0 < len(ends) <= MAX_END_LAYERS
    assert len(set(groups)) == len(groups)
    top = max(1, round(layers * 2 / 3))
    for group in groups:
        assert group == tuple(range(group[0], group[0] + len(group)))
        assert group[0] >= 0 and group[-1] < top
    assert all(layers // 3 <= n < layers for n in ends)
    assert groups[0][0] == 0
    least = LEAST_WIDTH_IN_DEPTH if top > MAX_WINDOW_STARTS else 1
    assert {len(g) for g in groups} == {w for w in WINDOW_WIDTHS if least <= w <= top}


def test_the_first_groups_tell_of_the_whole_depth() -> None:
    first = [group[0] for group in list_windows(30)[:3]]
    assert first == sorted(first) and max(first) - min(first) >= 10


def test_priors_fall_by_decades_from_the_strongest() -> None:
    assert list_priors(1536) == [30_000, 3_000, 300, 30, 3]


def test_the_score_is_harmonic() -> None:
    assert EditQuality(1.0, 1.0, 1.0, 1.2).score == 1.0
    assert EditQuality(1.0, 0.5, 0.25, 1.2).score == pytest.approx(3 / 7)
    assert EditQuality(1.0, 1.0, 0.0, 1.0).score == 0.0


@pytest.mark.parametrize("perplexity", [WRECKED_PERPLEXITY, 14.0, math.inf, math.nan])
def test_a_wrecked_model_scores_nothing(perplexity: float) -> None:
    assert EditQuality(1.0, 1.0, 1.0, 1.0, perplexity).score == 0.0


def test_the_choice_is_the_score_and_among_ties_the_smaller_norm() -> None:
    high, close = candidate(1.0, 1.0, 1.0, norm=5.0), candidate(1.0, 1.0, 0.96, norm=1.5)
    low = candidate(1.0, 0.5, 1.0, norm=1.0)
    assert 1 - close.quality.score < SCORE_SPREAD / 4
    assert choose_candidate([low, high, close]) is close
    many = [replace(c, facts=1600) for c in (low, high, close)]
    assert choose_candidate(many) is many[1]
    assert choose_candidate([low, high]) is high


def test_what_moves_the_perplexity_is_chosen_only_without_a_choice() -> None:
    loud = candidate(1.0, 1.0, 1.0, perplexity=MAX_PERPLEXITY + 0.01)
    mild = candidate(1.0, 0.6, 0.8, perplexity=MAX_PERPLEXITY)
    assert choose_candidate([loud, mild]) is mild
    assert choose_candidate([loud]) is loud


def test_the_choice_is_among_those_tried_on_most_facts() -> None:
    few, all_facts = candidate(1.0, 1.0, 1.0, facts=4), candidate(0.9, 0.5, 0.9)
    assert choose_candidate([few, all_facts]) is all_facts
    assert choose_candidate([few, candidate(0.0, 0.5, 0.9)]) is few


def test_a_search_that_found_nothing_is_an_error() -> None:
    for candidates in ([], [candidate(1.0, 0.0, 1.0)], [candidate(1, 1, 1, perplexity=9.0)]):
        with pytest.raises(KeditError, match="pilot facts") as caught:
            choose_candidate(candidates)
        assert (caught.value.code, "--pilot" in caught.value.hint) == ("calibration", True)


def test_a_candidate_tells_what_was_varied() -> None:
    told = candidate(1.0, 0.5, 0.25).as_dict()
    assert {"prior", "ridge", "clamp", "loss", "reached", "score", "facts", "perplexity_ratio"} <= {
        *told
    }


def test_both_kinds_of_layers_are_named() -> None:
    site = replace(make_default_site(6), subject_layers=(1, 2), end_layers=(3,))
    assert format_layers(site) == "subject 1, 2 + end 3"
    assert format_layers(replace(site, subject_layers=())) == "end 3"


def test_among_ties_the_one_is_chosen_that_states_the_most_facts() -> None:
    whole, weak = candidate(1.0, 0.88, 0.88, norm=1.01), candidate(0.94, 0.9, 0.93, norm=1.006)
    assert weak.quality.score > whole.quality.score
    assert choose_candidate([weak, whole]) is whole
