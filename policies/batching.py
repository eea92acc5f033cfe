"""How many facts a batch should have: a larger one shares its fixed cost, and changes more at once.

A batch costs what its facts cost, and something once. So the seconds of a fact in batches of b are
a + c / b, and from some size on a larger batch saves next to nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

SPEED_SLACK = 0.10  # over `per_fact`, that a fact may take for a smaller batch
MAX_QUALITY_LOSS = 0.01  # of a share, that a faster size may lose against the best


@dataclass(frozen=True)
class CostCurve:
    """Seconds of a fact in batches of b: per_fact + per_batch / b."""

    per_fact: float
    per_batch: float

    def estimate_seconds(self, batch: float) -> float:
        """Seconds of a fact, in batches of so many."""
        return self.per_fact + self.per_batch / batch


@dataclass(frozen=True)
class BatchQuality:
    """What batches of one size did: the shares of facts that hold, and of neighbours that stayed.

    `locality` is None where there was no neighbour to ask.
    """

    batch: int
    reliability: float
    locality: float | None


def fit_curve(observations: Sequence[tuple[float, float]]) -> CostCurve:
    """The curve nearest to (facts in a batch, seconds of a fact), by least squares.

    Neither cost is below nothing. One size alone cannot tell them apart: all is the facts' then.
    Raises ValueError without observations.
    """
    if not observations:
        raise ValueError("there is nothing to fit")
    shares = [1 / batch for batch, _ in observations]
    seconds = [spent for _, spent in observations]
    mean_share, mean_seconds = sum(shares) / len(shares), sum(seconds) / len(seconds)
    spread = sum((x - mean_share) ** 2 for x in shares)
    if not spread:
        return CostCurve(mean_seconds, 0.0)
    together = sum(
        (x - mean_share) * (y - mean_seconds) for x, y in zip(shares, seconds, strict=True)
    )
    per_batch = max(together / spread, 0.0)
    per_fact = mean_seconds - per_batch * mean_share
    if per_fact < 0:  # then the best curve without it
        squares = sum(x * x for x in shares)
        return CostCurve(0.0, sum(x * y for x, y in zip(shares, seconds, strict=True)) / squares)
    return CostCurve(per_fact, per_batch)


def choose_size(curve: CostCurve, tried: Sequence[BatchQuality]) -> int:
    """The smallest size that is nearly as fast as any, of those that are nearly as good as any.

    Without one that is fast enough it is the largest of the good ones; where no size is good at
    both reliability and locality, those count as good that lose least.
    Raises ValueError when nothing was tried.
    """
    if not tried:
        raise ValueError("no size was tried")
    lost = {one.batch: _compute_loss(one, tried) for one in tried}
    bound = (
        max(MAX_QUALITY_LOSS, min(lost.values())) + 1e-9
    )  # shares of some facts are no exact numbers
    good = sorted(batch for batch, loss in lost.items() if loss <= bound)
    limit = curve.per_fact * (1 + SPEED_SLACK)
    return next((batch for batch in good if curve.estimate_seconds(batch) <= limit), good[-1])


def _compute_loss(one: BatchQuality, tried: Sequence[BatchQuality]) -> float:
    """What a size loses against the best, in the column in which it loses more."""
    held = max(other.reliability for other in tried) - one.reliability
    stayed = max(other.locality or 0.0 for other in tried) - (one.locality or 0.0)
    return max(held, stayed)
