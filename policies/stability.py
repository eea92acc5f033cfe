"""When the weights are no longer healthy: from an audit's numbers to one of four verdicts."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from memory.health import Health


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

    def judge(self, value: float) -> Action:
        """NaN counts as beyond every limit."""
        if not value < self.revert:
            return Action.REVERT
        if value >= self.consolidate:
            return Action.CONSOLIDATE
        return Action.WARN if value >= self.warn else Action.KEEP


@dataclass(frozen=True)
class Thresholds:
    """norm: ‖W‖/‖W0‖. perplexity: ratio to the base. activation: |ratio to the base − 1|.
    agreement: share of the canary's statements that are completed differently now."""

    norm: Limits
    perplexity: Limits
    activation: Limits
    agreement: Limits


@dataclass(frozen=True)
class Verdict:
    """What to do, and the measures that say so."""

    action: Action
    reasons: tuple[str, ...]


def judge(health: Health, thresholds: Thresholds) -> Verdict:
    """The severest of what the single measures ask for."""
    found = list(_judge_each(health, thresholds))
    action = max((a for a, _ in found), default=Action.KEEP)
    return Verdict(action, tuple(reason for a, reason in found if a > Action.KEEP))


def _judge_each(health: Health, thresholds: Thresholds) -> Iterator[tuple[Action, str]]:
    if not health.finite:
        yield Action.REVERT, "a number is NaN or infinite"
    for layer, ratio in health.norm_ratio.items():
        yield thresholds.norm.judge(ratio), f"norm of layer {layer} is {ratio:.3f} of the base"
    for layer, ratio in health.activation_ratio.items():
        yield (
            thresholds.activation.judge(abs(ratio - 1)),
            f"activations of layer {layer} are {ratio:.3f} of the base",
        )
    yield (
        thresholds.perplexity.judge(health.perplexity_ratio),
        f"canary perplexity is {health.perplexity_ratio:.3f} of the base",
    )
    yield (
        thresholds.agreement.judge(1 - health.agreement),
        f"agreement with the base on statements is {health.agreement:.3f}",
    )
