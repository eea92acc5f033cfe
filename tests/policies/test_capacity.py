import math
from collections.abc import Callable
from dataclasses import replace

import pytest

from policies.capacity import (
    CONFIDENT,
    Capacity,
    Observation,
    estimate_capacity,
    make_observation,
)
from policies.health_limits import Limits, Thresholds

THRESHOLDS = Thresholds(
    norm=Limits(2.0, 5.0, 8.0),
    perplexity=Limits(1.05, 1.10, 1.15),
    activation=Limits(0.1, 0.2, 0.4),
    agreement=Limits(0.03, 0.06, 0.15),
    retention=Limits(0.03, 0.05, 0.1),
)
NORM = "norm of layer 2"


def history(law: Callable[[int], float], *counts: int, figure: str = NORM) -> list[Observation]:
    return [Observation(n, {figure: law(n)}) for n in counts]


def bears(*observations: Observation) -> Capacity:
    found = estimate_capacity(observations, THRESHOLDS)
    assert found is not None
    return found


@pytest.mark.parametrize("b", [0.5, 1.0, 2.0])
def test_a_power_law_is_followed_to_the_limit(b: float) -> None:
    a = 4.0 / 120**b  # the norm may grow by 4, and does so at 120 facts
    law = history(lambda n: a * n**b, 30, 60, 90)
    assert bears(*law) == Capacity(119, NORM, 4.0)
    assert bears(*reversed(law)) == bears(*law)


def test_one_observation_is_taken_as_a_straight_line() -> None:
    assert bears(*history(lambda _n: 3.0, 90)) == Capacity(119, NORM, 4.0)


def test_no_fit_is_steeper_or_flatter_than_sense_allows() -> None:
    steep = bears(*history({40: 0.01, 60: 3.5}.__getitem__, 40, 60))
    flat = bears(*history({40: 3.6, 60: 3.6}.__getitem__, 40, 60))
    middle = math.sqrt(40 * 60)  # the bounded slopes meet both points half way, in logs
    assert steep == Capacity(120, None, None)
    assert flat.facts == math.ceil(middle * (4 / 3.6) ** (1 / 0.3)) - 1


def test_nothing_is_foreseen_beyond_twice_what_was_seen() -> None:
    assert bears(*history(lambda n: 0.001 * n, 20, 50)) == Capacity(100, None, None)
    assert str(bears(*history(lambda n: 0.001 * n, 50))) == "their capacity is at least 100 facts"


def test_the_figure_that_is_the_first_at_its_limit_decides() -> None:
    moved = {NORM: 2.0, "agreement": 0.05, "perplexity": 0.01, "activations of layer 1": 0.11}
    assert bears(Observation(100, moved)) == Capacity(119, "agreement", 0.06)
    assert "about 119 facts (agreement)" in str(bears(Observation(100, moved)))


def test_a_count_that_has_reached_a_limit_is_never_borne() -> None:
    law = history({10: 0.1, 50: 4.0, 100: 2.0}.__getitem__, 10, 50, 100)
    assert bears(*law).facts < 50
    assert bears(*history(lambda _n: math.nan, 30)) == Capacity(29, NORM, 4.0)
    assert bears(*history(lambda _n: math.inf, 1)) == Capacity(0, NORM, 4.0)


def test_what_has_not_moved_sets_no_limit() -> None:
    assert bears(*history(lambda _n: -0.5, 30)) == Capacity(60, None, None)
    assert bears(*history(lambda _n: 1e-300, 30)) == Capacity(60, None, None)


def test_nothing_observed_is_nothing_known() -> None:
    assert estimate_capacity([], THRESHOLDS) is None
    assert estimate_capacity([Observation(0, {NORM: 0.1})], THRESHOLDS) is None


def test_a_limit_below_the_unedited_model_leaves_room_for_nothing() -> None:
    low = Thresholds(Limits(0.1, 0.2, 0.3), *[THRESHOLDS.perplexity] * 4)
    assert estimate_capacity(history(lambda _n: 0.1, 30), low) == Capacity(
        0, NORM, pytest.approx(-0.8)
    )


def test_of_the_two_agreements_the_judged_one_decides() -> None:
    moved = {"agreement": 0.3, CONFIDENT: 0.02}
    seen = [Observation(100, moved)]
    assert bears(*seen).figure == "agreement"
    sure = replace(THRESHOLDS, confident=Limits(0.01, 0.025, 0.04))
    assert estimate_capacity(seen, sure) == Capacity(124, CONFIDENT, 0.025)
    # Where too few statements are confident, and in what older versions measured, all of them are.
    assert estimate_capacity([Observation(100, {"agreement": 0.05})], sure) == Capacity(
        119, "agreement", 0.06
    )
    older = Observation(50, {"agreement": 0.2})
    assert estimate_capacity([older, *seen], sure) == Capacity(124, CONFIDENT, 0.025)


def test_figures_of_generations_are_read_as_they_are_kept() -> None:
    figures = {
        "norm_ratio": {"1": 1.5, "2": "inf"},
        "activation_ratio": {"1": 0.9},
        "perplexity_ratio": 1.25,
        "agreement": 0.75,
        "finite": False,
    }
    assert make_observation(7, figures) == Observation(
        7,
        {
            "norm of layer 1": 0.5,
            "norm of layer 2": math.inf,
            "activations of layer 1": pytest.approx(0.1),
            "perplexity": 0.25,
            "agreement": 0.25,
        },
    )
    assert make_observation(7, {}) == Observation(7, {})
    sure = make_observation(7, {"agreement": 0.75, "confident_agreement": 0.875})
    assert sure.changes == {"agreement": 0.25, CONFIDENT: 0.125}
    few = make_observation(7, {"agreement": 0.75, "confident_agreement": None})
    assert few.changes == {"agreement": 0.25}
