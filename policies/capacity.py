"""How many facts the weights bear: learned from what the generations so far have measured.

Every judged figure moves away from the unedited model's as facts come in. A power law
a · n^b through the origin, fitted to the generations, foretells the count at which a figure
reaches the limit from which a solve would have to be consolidated; the joint solve is consolidated
already, so that count is the end. The first figure to get there decides.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from policies.stability import Thresholds

MIN_EXPONENT, MAX_EXPONENT = (
    0.3,
    3.0,
)  # of b: what lies outside comes from too few or odd observations
MAX_PREDICTED_FACTS = 1e12  # facts: a figure that gets there later sets no limit
MAX_EXTRAPOLATION = 2  # times the largest count seen: no fit is believed further


@dataclass(frozen=True)
class Observation:
    """How far the figures moved, by name, with so many facts in the weights."""

    facts: int
    changes: Mapping[str, float]


@dataclass(frozen=True)
class Capacity:
    """The largest count that keeps every figure below its limit, the figure that is the first to
    reach it, and that limit; neither where no figure does as far as can be foreseen."""

    facts: int
    figure: str | None
    limit: float | None

    def __str__(self) -> str:
        if self.figure is None:
            return f"they bear at least {self.facts} facts"
        return f"they bear about {self.facts} facts ({self.figure})"


def make_observation(facts: int, figures: Mapping[str, Any]) -> Observation:
    """From the figures of a generation, as `Health.as_dict` gives them. Those of an older version
    may lack some, and what was not finite is text."""
    moved: dict[str, float] = {}
    for layer, ratio in figures.get("norm_ratio", {}).items():
        moved[f"norm of layer {layer}"] = float(ratio) - 1
    for layer, ratio in figures.get("activation_ratio", {}).items():
        moved[f"activations of layer {layer}"] = abs(float(ratio) - 1)
    if "perplexity_ratio" in figures:
        moved["perplexity"] = float(figures["perplexity_ratio"]) - 1
    if "agreement" in figures:
        moved["agreement"] = 1 - float(figures["agreement"])
    return Observation(facts, moved)


def estimate_capacity(
    observations: Sequence[Observation], thresholds: Thresholds
) -> Capacity | None:
    """What the weights bear by all that has been observed; None before there is anything."""
    seen = [o for o in observations if o.facts > 0]
    if not seen:
        return None
    foreseen = MAX_EXTRAPOLATION * max(o.facts for o in seen)
    found = [Capacity(foreseen, None, None)]
    for figure in sorted({name for o in seen for name in o.changes}):
        limit = _find_limit(figure, thresholds)
        points = [(o.facts, o.changes[figure]) for o in seen if figure in o.changes]
        if (most := _predict_capacity(points, limit)) < foreseen:
            found.append(Capacity(int(most), figure, limit))
    return min(found, key=lambda c: c.facts)


def _find_limit(figure: str, thresholds: Thresholds) -> float:
    """How far a figure may move."""
    limits = {
        "norm": thresholds.norm.consolidate - 1,
        "activations": thresholds.activation.consolidate,
        "perplexity": thresholds.perplexity.consolidate - 1,
        "agreement": thresholds.agreement.consolidate,
    }
    return limits[figure.split()[0]]


def _predict_capacity(points: Sequence[tuple[int, float]], limit: float) -> float:
    """The largest count below the limit by the fit, and below every count that reached it."""
    if limit <= 0:
        return 0
    most = min((n - 1.0 for n, value in points if not value < limit), default=math.inf)
    usable = [(n, value) for n, value in points if 0 < value < math.inf]
    if usable:
        a, b = _fit_power_law(usable)
        crossing = (math.log(limit) - a) / b  # in logs: it may lie beyond all numbers
        if crossing < math.log(MAX_PREDICTED_FACTS):
            most = min(most, math.ceil(math.exp(crossing) - 1e-9) - 1)
    return max(0, most)


def _fit_power_law(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """log a and b of value = a · n^b, by least squares in logs; b is 1 where there is one count."""
    xs = [math.log(n) for n, _ in points]
    ys = [math.log(value) for _, value in points]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((one - x) ** 2 for one in xs)
    slope = 1.0
    if spread > 1e-12:
        slope = sum((one - x) * (other - y) for one, other in zip(xs, ys, strict=True)) / spread
    b = min(max(slope, MIN_EXPONENT), MAX_EXPONENT)
    return y - b * x, b
