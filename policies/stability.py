"""When the weights are no longer healthy: from an audit's numbers to one of four verdicts."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from memory.model.canary import Health

HYSTERESIS = 0.1  # of the way from rest to a limit
TOLERANCE = 0.01  # a figure that is worse by less is not worse


class Action(IntEnum):
    """Verdicts, mildest first."""

    KEEP = 0
    WARN = 1
    CONSOLIDATE = 2
    REVERT = 3

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Limits:
    """Where a measure starts to warn, to ask for consolidation, and to ask for a revert."""

    warn: float
    consolidate: float
    revert: float

    def judge_value(self, value: float) -> Action:
        """NaN counts as beyond every limit."""
        if not value < self.revert:
            return Action.REVERT
        if value >= self.consolidate:
            return Action.CONSOLIDATE
        return Action.WARN if value >= self.warn else Action.KEEP

    def ease_limits(self, rest: float) -> "Limits":
        """The same limits, nearer to where the unedited model rests."""
        nearer = [rest + (1 - HYSTERESIS) * (limit - rest) for limit in vars(self).values()]
        return Limits(*nearer)


@dataclass(frozen=True)
class Thresholds:
    """norm: ‖W‖/‖W0‖. perplexity: ratio to the base. activation: |ratio to the base − 1|.
    agreement: share of the canary's statements that are completed differently now. retention:
    share of the oldest live facts that are not stated any more."""

    norm: Limits
    perplexity: Limits
    activation: Limits
    agreement: Limits
    retention: Limits

    def ease_limits(self) -> "Thresholds":
        """Limits below which the figures are clearly well, not just for once."""
        rests = {"norm": 1.0, "perplexity": 1.0}
        return Thresholds(**{n: own.ease_limits(rests.get(n, 0.0)) for n, own in vars(self).items()})


@dataclass(frozen=True)
class Verdict:
    """What to do, and the measures that say so."""

    action: Action
    reasons: tuple[str, ...]


def judge_health(health: Health, thresholds: Thresholds, retention: float | None = None) -> Verdict:
    """The severest of what the single measures ask for; `retention`, where facts were asked, is
    the share that is still stated."""
    found = list(_judge_each(health, thresholds))
    if retention is not None:
        reason = f"of the oldest facts {retention:.3f} are still stated"
        found.append((thresholds.retention.judge_value(1 - retention), reason))
    action = max((a for a, _ in found), default=Action.KEEP)
    return Verdict(action, tuple(reason for a, reason in found if a > Action.KEEP))


def _judge_each(health: Health, thresholds: Thresholds) -> Iterator[tuple[Action, str]]:
    if not health.finite:
        yield Action.REVERT, "a number is NaN or infinite"
    for layer, ratio in health.norm_ratio.items():
        yield (
            thresholds.norm.judge_value(ratio),
            f"norm of layer {layer} is {ratio:.3f} of the base",
        )
    for layer, ratio in health.activation_ratio.items():
        yield (
            thresholds.activation.judge_value(abs(ratio - 1)),
            f"activations of layer {layer} are {ratio:.3f} of the base",
        )
    yield (
        thresholds.perplexity.judge_value(health.perplexity_ratio),
        f"canary perplexity is {health.perplexity_ratio:.3f} of the base",
    )
    yield (
        thresholds.agreement.judge_value(1 - health.agreement),
        f"agreement with the base on statements is {health.agreement:.3f}",
    )


def find_worsened(was: Health, now: Health) -> list[str]:
    """What has got worse from one state to another, by more than rounding and chance."""
    found = [] if now.finite else ["a number is NaN or infinite"]
    pairs = [("canary perplexity", was.perplexity, now.perplexity)]
    pairs += [(f"norm of layer {n}", was.norm_ratio[n], now.norm_ratio[n]) for n in was.norm_ratio]
    for name, before, after in pairs:
        if not after <= (1 + TOLERANCE) * before:
            found.append(f"{name} would go from {before:.4g} to {after:.4g}")
    if not now.agreement >= was.agreement - TOLERANCE:
        found.append(f"agreement would go from {was.agreement:.4g} to {now.agreement:.4g}")
    return found
