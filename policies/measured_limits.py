"""Limits of an audit's figures, derived from what was measured of the model.

The unit is rounding: a figure warns where rounding the weights to 8 bits has moved it to, asks for
consolidation where 6 bits have, and for a revert where 5 bits have. Bounds keep these away from
noise below, and from damage that others have seen above.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

from policies.health_limits import Limits
from policies.rounding import WIDTHS, RoundingEffect

# Tightest and widest limits. Of ‖W‖/‖W0‖: editors have collapsed near 2 and beyond 10.
NORM_RANGE = (Limits(1.15, 1.3, 1.6), Limits(3.0, 5.0, 8.0))
# Of the change of the activation norms, as a share.
ACTIVATION_RANGE = (Limits(0.03, 0.05, 0.10), Limits(0.1, 0.2, 0.4))
VARIATION_FACTORS = (1.0, 2.0, 4.0)
# Of the perplexity ratio: less than a hundredth nobody reads out of a text.
PERPLEXITY_RANGE = (Limits(1.01, 1.02, 1.05), Limits(1.05, 1.10, 1.15))
# Of the share of statements that are completed differently. The tightest are in statements, between
# two counts: one or two of them turn by chance (8 bits change one on average in the models seen),
# and each further verdict takes more than the one before.
MIN_CHANGED = (2.5, 3.5, 5.5)
MAX_CHANGED_SHARE = Limits(0.05, 0.10, 0.20)


def derive_agreement_limits(
    effects: Sequence[RoundingEffect], counted: int, confident: bool
) -> Limits:
    """Return the shares of statements that rounding to 8, 6 and 5 bits changes.

    counted: the number of statements that the agreement was counted on, of the confident ones or of
    all. A width changes only a few of them, so that its own count is mostly chance. But a rounding
    error halves with each bit, and with it the share of completions near enough to a tie to turn:
    the counts of all widths together give one estimate. (Fewer bits than 5 change more than that:
    real models break there.)
    """
    agreements = [e.confident_agreement if confident else e.agreement for e in effects]
    changed = sum(1 - share for share in agreements if share is not None)
    at_one_bit = changed / sum(2.0**-e.bits for e in effects)
    shares = [at_one_bit * 2.0**-bits for bits in WIDTHS]
    least = Limits(*(count / counted for count in MIN_CHANGED))
    return _clamp_limits(shares, least, MAX_CHANGED_SHARE, digits=4)


def derive_perplexity_limits(effects: Sequence[RoundingEffect]) -> Limits:
    """Return the perplexity ratios that rounding to 8, 6 and 5 bits causes, within
    PERPLEXITY_RANGE."""
    by_bits = {e.bits: e.perplexity_ratio for e in effects}
    return _clamp_limits([by_bits[bits] for bits in WIDTHS], *PERPLEXITY_RANGE)


def derive_activation_limits(effects: Sequence[RoundingEffect], variation: float) -> Limits:
    """Return the changes of the activation norms that rounding to 8, 6 and 5 bits causes, within
    ACTIVATION_RANGE.

    They are not below 1, 2 and 4 times the variation between two halves of ordinary text: a
    rounding error has no direction, and hardly moves a mean norm.
    """
    by_bits = {e.bits: e.activation_change for e in effects}
    pairs = zip(WIDTHS, VARIATION_FACTORS, strict=True)
    wanted = [max(by_bits[bits], factor * variation) for bits, factor in pairs]
    return _clamp_limits(wanted, *ACTIVATION_RANGE)


def derive_norm_limits(curve: Sequence[tuple[float, float]], activation: Limits) -> Limits:
    """Return the norm ratios at which an update, scaled up, has moved the activation norms to their
    limits, within NORM_RANGE. curve: norm ratio and activation change, by rising scale."""
    wanted = (activation.warn, activation.consolidate, activation.revert)
    return _clamp_limits([_find_crossing(curve, change) for change in wanted], *NORM_RANGE)


def _find_crossing(curve: Sequence[tuple[float, float]], wanted: float) -> float:
    """Return the norm ratio at which the activation change reaches `wanted`, by interpolation."""
    for (norm, change), (next_norm, next_change) in pairwise([(1.0, 0.0), *curve]):
        if next_change >= wanted:
            return norm + (next_norm - norm) * (wanted - change) / (next_change - change)
    return math.inf


def _clamp_limits(
    values: Sequence[float], tightest: Limits, widest: Limits, digits: int = 3
) -> Limits:
    """Return limits within bounds, none below the one before."""
    bounds = zip(vars(tightest).values(), values, vars(widest).values(), strict=True)
    clamped = [min(max(low, value), high) for low, value, high in bounds]
    return Limits(*(round(max(clamped[: n + 1]), digits) for n in range(len(clamped))))
