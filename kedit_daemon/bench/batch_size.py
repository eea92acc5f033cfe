"""Choice of a batch size: the smallest that is nearly as fast and nearly as good as any."""

from collections.abc import Sequence
from dataclasses import dataclass

from policies.cost_curve import CostCurve

MAX_SLOWDOWN = 0.10  # over `per_fact`, the share that a fact may take longer in a smaller batch
MAX_QUALITY_LOSS = 0.01  # of a share, that a faster size may lose against the best


@dataclass(frozen=True)
class BatchQuality:
    """Shares of the facts that hold after batches of one size, and of the unchanged neighbours.

    `locality` is None where there were no neighbours.
    """

    batch: int
    reliability: float
    locality: float | None


def choose_size(curve: CostCurve, tried: Sequence[BatchQuality]) -> int:
    """Return the smallest size that is nearly as fast as any, of those nearly as good as any.

    Without one that is fast enough it is the largest of the good ones. Where no size is good at
    both reliability and locality, those that lose least count as good.
    Raises ValueError when nothing was tried.
    """
    if not tried:
        raise ValueError("no size was tried")
    losses = {quality.batch: _compute_loss(quality, tried) for quality in tried}
    bound = max(MAX_QUALITY_LOSS, min(losses.values())) + 1e-9  # shares are rounded floats
    good = sorted(batch for batch, loss in losses.items() if loss <= bound)
    limit = curve.per_fact * (1 + MAX_SLOWDOWN)
    return next((batch for batch in good if curve.estimate_seconds(batch) <= limit), good[-1])


def _compute_loss(quality: BatchQuality, tried: Sequence[BatchQuality]) -> float:
    """Return what a size loses against the best in reliability or locality, whichever is more."""
    reliability = max(other.reliability for other in tried) - quality.reliability
    locality = max(other.locality or 0.0 for other in tried) - (quality.locality or 0.0)
    return max(reliability, locality)
