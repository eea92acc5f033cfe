"""Rounding of the weights as the unit of change that people know: models are served with 8, 6 or 4
bits every day. Its effect on a model is measured on the canary, and edits are compared with it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from memory.model.canary import Canary
from memory.model.rounded_weights import serve_rounded

WIDTHS = (8, 6, 5)  # bits; what others change follows from these
MAX_BITS = 16.0
# Rounding errors halve with each bit, and the KL is of second order in them.
KL_BITS = math.log(4)


@dataclass(frozen=True)
class RoundingEffect:
    """Figures of a model whose weights are rounded to some bits, against the unedited one.

    agreement: of all statements. confident_agreement: of those that the model completes with
    confidence, None where they are too few. activation_change: the largest of an edited layer.
    """

    bits: int
    agreement: float
    confident_agreement: float | None
    kl: float
    perplexity_ratio: float
    activation_change: float

    def as_dict(self) -> dict[str, Any]:
        """Return the figures as JSON-ready values."""
        return asdict(self)


def measure_rounding(canary: Canary) -> list[RoundingEffect]:
    """Measure the effects of rounding the canary's model, which must be unedited, to WIDTHS.

    Each width takes a pass of the canary.
    """
    effects = []
    for bits in WIDTHS:
        with serve_rounded(canary.model, bits):
            health = canary.measure_health()
        change = max((abs(ratio - 1) for ratio in health.activation_ratio.values()), default=0.0)
        effects.append(
            RoundingEffect(
                bits=bits,
                agreement=health.agreement,
                confident_agreement=health.confident_agreement,
                kl=health.kl,
                perplexity_ratio=health.perplexity_ratio,
                activation_change=change,
            )
        )
    return effects


def find_equal_rounding(kl: float, rounding_kl: Mapping[int, float]) -> float | None:
    """Return the bits to which rounding changes the model as much as an edit does, at most 16.

    The measure is the mean KL from the unedited model at the statements' ends: of all figures it
    has the least noise, and an edit and a rounding move it alike. rounding_kl: that of each number
    of bits. Between two of them log KL is interpolated; beyond them it falls by log 4 a bit.
    Returns None where there is nothing to compare: no change, a KL that is not finite, no table.
    """
    points = sorted((bits, math.log(value)) for bits, value in rounding_kl.items() if value > 0)
    if not points or not 0 < kl < math.inf:
        return None
    wanted = math.log(kl)
    lowest, highest = points[0], points[-1]
    if wanted >= lowest[1]:
        bits = lowest[0] - (wanted - lowest[1]) / KL_BITS
    elif wanted <= highest[1]:
        bits = highest[0] + (highest[1] - wanted) / KL_BITS
    else:
        bits = _interpolate_bits(points, wanted)
    return round(min(max(bits, 1.0), MAX_BITS), 1)


def _interpolate_bits(points: Sequence[tuple[int, float]], wanted: float) -> float:
    """Return the bits at which log KL falls to `wanted`, from the fewest bits on."""
    for (bits, value), (next_bits, next_value) in pairwise(points):
        if next_value <= wanted < value:
            return bits + (next_bits - bits) * (value - wanted) / (value - next_value)
    return float(points[-1][0])
