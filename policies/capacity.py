"""Capacity of the weights in facts, estimated from the figures of the generations so far.

Every judged figure moves away from the unedited model's as facts come in. A power law a · n^b
through the origin, fitted to the generations, predicts the count at which a figure reaches the
limit from which a solve would have to be consolidated; the joint solve is consolidated already, so
that count is the capacity. The first figure to reach its limit decides.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from policies.health_limits import Thresholds

CONFIDENT = "confident agreement"  # a figure
MIN_EXPONENT, MAX_EXPONENT = 0.3, 3.0  # of b: others come from too few or odd observations
MAX_PREDICTED_FACTS = 1e12  # a figure that reaches its limit later sets none
MAX_EXTRAPOLATION = 2  # times the largest count seen: no fit is trusted further


@dataclass(frozen=True)
class Observation:
    """Changes of the figures, by name, with a number of facts in the weights."""

    facts: int
    changes: Mapping[str, float]


@dataclass(frozen=True)
class Capacity:
    """The largest count of facts that keeps every figure below its limit.

    figure and limit: the figure that is the first to reach its limit, and that limit; None where
    none does within the extrapolation.
    """

    facts: int
    figure: str | None
    limit: float | None

    def __str__(self) -> str:
        if self.figure is None:
            return f"their capacity is at least {self.facts} facts"
        return f"their capacity is about {self.facts} facts ({self.figure})"


def make_observation(facts: int, figures: Mapping[str, Any]) -> Observation:
    """Return the changes in a generation's figures, which are as `Health.as_dict` returns them.

    Those of an older version may lack some, and a value that was not finite is text.
    """
    changes: dict[str, float] = {}
    for layer, ratio in figures.get("norm_ratio", {}).items():
        changes[f"norm of layer {layer}"] = float(ratio) - 1
    for layer, ratio in figures.get("activation_ratio", {}).items():
        changes[f"activations of layer {layer}"] = abs(float(ratio) - 1)
    if "perplexity_ratio" in figures:
        changes["perplexity"] = float(figures["perplexity_ratio"]) - 1
    if "agreement" in figures:
        changes["agreement"] = 1 - float(figures["agreement"])
    if figures.get("confident_agreement") is not None:
        changes[CONFIDENT] = 1 - float(figures["confident_agreement"])
    return Observation(facts, changes)


def estimate_capacity(
    observations: Sequence[Observation], thresholds: Thresholds
) -> Capacity | None:
    """Estimate the capacity from all observations; None before there are any."""
    seen = [o for o in observations if o.facts > 0]
    if not seen:
        return None
    horizon = MAX_EXTRAPOLATION * max(o.facts for o in seen)
    found = [Capacity(horizon, None, None)]
    figures = {name for o in seen for name in o.changes}
    # Of the two agreements one is judged.
    figures -= {CONFIDENT} if thresholds.confident is None else set()
    figures -= {"agreement"} if CONFIDENT in figures else set()
    for figure in sorted(figures):
        limit = _find_limit(figure, thresholds)
        points = [(o.facts, o.changes[figure]) for o in seen if figure in o.changes]
        if (facts := _predict_capacity(points, limit)) < horizon:
            found.append(Capacity(int(facts), figure, limit))
    return min(found, key=lambda c: c.facts)


def _find_limit(figure: str, thresholds: Thresholds) -> float:
    """Return the limit of a judged figure's change."""
    if figure == CONFIDENT and thresholds.confident is not None:
        return thresholds.confident.consolidate
    limits = {
        "norm": thresholds.norm.consolidate - 1,
        "activations": thresholds.activation.consolidate,
        "perplexity": thresholds.perplexity.consolidate - 1,
        "agreement": thresholds.agreement.consolidate,
    }
    return limits[figure.split()[0]]


def _predict_capacity(points: Sequence[tuple[int, float]], limit: float) -> float:
    """Return the largest count below the limit by the fit, and below every count that met it."""
    if limit <= 0:
        return 0
    facts = min((n - 1.0 for n, value in points if not value < limit), default=math.inf)
    usable = [(n, value) for n, value in points if 0 < value < math.inf]
    if usable:
        a, b = _fit_power_law(usable)
        crossing = (math.log(limit) - a) / b  # in logs: it may overflow
        if crossing < math.log(MAX_PREDICTED_FACTS):
            facts = min(facts, math.ceil(math.exp(crossing) - 1e-9) - 1)
    return max(0, facts)


def _fit_power_law(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Fit value = a · n^b by least squares in logs; returns log a and b, 1 for a single count."""
    xs = [math.log(n) for n, _ in points]
    ys = [math.log(value) for _, value in points]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    variance = sum((log_n - x) ** 2 for log_n in xs)
    slope = 1.0
    if variance > 1e-12:
        covariance = sum((log_n - x) * (log_v - y) for log_n, log_v in zip(xs, ys, strict=True))
        slope = covariance / variance
    b = min(max(slope, MIN_EXPONENT), MAX_EXPONENT)
    return y - b * x, b
