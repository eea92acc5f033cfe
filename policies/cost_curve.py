"""Cost of a batch: a fixed cost for the batch, and a cost for each of its facts.

In batches of b facts, one fact takes a + c / b seconds, so that from some size on a larger batch
saves next to nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class CostCurve:
    """Seconds per fact in batches of b facts: per_fact + per_batch / b."""

    per_fact: float
    per_batch: float

    def estimate_seconds(self, batch: float) -> float:
        """Return the seconds per fact in batches of this size."""
        return self.per_fact + self.per_batch / batch


def fit_curve(observations: Sequence[tuple[float, float]]) -> CostCurve:
    """Fit the curve to (facts per batch, seconds per fact) by least squares, with no negative cost.

    One batch size alone cannot tell the two costs apart; all of it then counts as the facts'.
    Raises ValueError without observations.
    """
    if not observations:
        raise ValueError("there are no observations to fit")
    shares = [1 / batch for batch, _ in observations]
    seconds = [spent for _, spent in observations]
    mean_share, mean_seconds = sum(shares) / len(shares), sum(seconds) / len(seconds)
    variance = sum((x - mean_share) ** 2 for x in shares)
    if not variance:
        return CostCurve(mean_seconds, 0.0)
    pairs = list(zip(shares, seconds, strict=True))
    covariance = sum((x - mean_share) * (y - mean_seconds) for x, y in pairs)
    per_batch = max(covariance / variance, 0.0)
    per_fact = mean_seconds - per_batch * mean_share
    if per_fact < 0:  # then the best curve through per_fact = 0
        return CostCurve(0.0, sum(x * y for x, y in pairs) / sum(x * x for x in shares))
    return CostCurve(per_fact, per_batch)
