import math

import pytest

from policies.health_limits import Limits
from policies.measured_limits import (
    ACTIVATION_RANGE,
    MAX_CHANGED_SHARE,
    NORM_RANGE,
    PERPLEXITY_RANGE,
    derive_activation_limits,
    derive_agreement_limits,
    derive_norm_limits,
    derive_perplexity_limits,
)
from policies.rounding import WIDTHS, RoundingEffect


def round_all(
    counts: tuple[float, ...] = (0, 3, 4),
    perplexities: tuple[float, ...] = (1.0, 1.03, 1.12),
    changes: tuple[float, ...] = (0.0,) * 3,
    counted: int = 138,
) -> list[RoundingEffect]:
    rows = zip(WIDTHS, counts, perplexities, changes, strict=True)
    return [
        RoundingEffect(bits, 1 - 3 * n / counted, 1 - n / counted, 0.1, perplexity, change)
        for bits, n, perplexity, change in rows
    ]


def test_agreement_limits_pool_the_counts_of_all_widths() -> None:
    # 26 statements in all, which halve with each bit: 16, 8 and 2.
    found = derive_agreement_limits(round_all((0, 6, 20), counted=200), 200, confident=True)
    assert found == Limits(2.5 / 200, 8 / 200, 16 / 200)
    exact = round_all((2, 8, 16), counted=200)
    assert derive_agreement_limits(exact, 200, confident=True) == found


def test_agreement_limits_of_all_statements_are_from_their_own_counts() -> None:
    effects = round_all((0, 6, 20), counted=600)
    assert derive_agreement_limits(effects, 600, confident=False) == Limits(0.01, 0.04, 0.08)


def test_each_verdict_takes_a_statement_more_even_where_rounding_changes_none() -> None:
    found = derive_agreement_limits(round_all((0,) * 3), 138, confident=True)
    assert [math.ceil(limit * 138) for limit in vars(found).values()] == [3, 4, 6]


def test_agreement_limits_stay_below_their_caps() -> None:
    found = derive_agreement_limits(round_all((40, 90, 120)), 138, confident=True)
    assert found == MAX_CHANGED_SHARE


@pytest.mark.parametrize(
    ("perplexities", "wanted"),
    [
        ((1.0,) * 3, PERPLEXITY_RANGE[0]),
        ((0.99, 1.03, 1.06), Limits(1.01, 1.03, 1.06)),
        ((1.04, 1.02, 1.01), Limits(1.04, 1.04, 1.05)),  # they rise, whatever chance did
        ((2.0, 4.0, 5.0), PERPLEXITY_RANGE[1]),
        ((math.nan,) * 3, PERPLEXITY_RANGE[0]),
    ],
)
def test_perplexity_limits_are_those_of_8_6_and_5_bits_within_bounds(
    perplexities: tuple[float, ...], wanted: Limits
) -> None:
    assert derive_perplexity_limits(round_all(perplexities=perplexities)) == wanted


@pytest.mark.parametrize(
    ("variation", "wanted"),
    [(0.0, ACTIVATION_RANGE[0]), (0.04, Limits(0.04, 0.08, 0.16)), (9.0, ACTIVATION_RANGE[1])],
)
def test_activation_limits_follow_the_variation_within_bounds(
    variation: float, wanted: Limits
) -> None:
    assert derive_activation_limits(round_all(), variation) == wanted


def test_activation_limits_are_not_below_what_rounding_changes() -> None:
    effects = round_all(changes=(0.05, 0.07, 0.2))
    assert derive_activation_limits(effects, 0.01) == Limits(0.05, 0.07, 0.2)
    assert derive_activation_limits(effects, 0.04) == Limits(0.05, 0.08, 0.2)


def test_norm_limits_are_where_the_activations_reach_theirs() -> None:
    limits = Limits(0.1, 0.2, 0.4)
    curve = [(1.5, 0.05), (2.5, 0.15), (4.5, 0.4)]
    assert derive_norm_limits(curve, limits) == Limits(2.0, 2.9, 4.5)
    assert derive_norm_limits([], limits) == NORM_RANGE[1]  # nothing was moved so far
    assert derive_norm_limits([(1.01, 5.0)], limits) == NORM_RANGE[0]
    assert derive_norm_limits([(2.0, math.nan)], limits) == NORM_RANGE[1]
