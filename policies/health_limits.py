"""Stability of the edited weights: from the figures of an audit to one of four verdicts."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # it imports torch, and a page that draws the limits needs none
    from memory.model.canary import Health

HYSTERESIS = 0.1  # of the way from the unedited model's value to a limit
# Share of the replies about edited subjects and neighbours that may change before an audit warns.
# It does no more: to solve again would not help, and a revert is for harm to all else.
LOCALITY_WARN = 0.1
TOLERANCE = 0.01  # by which a figure may get worse through rounding and chance


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
    """Values from which a figure warns, asks for consolidation, and asks for a revert."""

    warn: float
    consolidate: float
    revert: float

    def judge_value(self, value: float) -> Action:
        """Return the action that a value asks for; NaN is beyond every limit."""
        if not value < self.revert:
            return Action.REVERT
        if value >= self.consolidate:
            return Action.CONSOLIDATE
        return Action.WARN if value >= self.warn else Action.KEEP

    def ease_limits(self, unedited: float) -> "Limits":
        """Return limits that are nearer to the unedited model's value, by the hysteresis."""
        eased = [unedited + (1 - HYSTERESIS) * (limit - unedited) for limit in vars(self).values()]
        return Limits(*eased)


@dataclass(frozen=True)
class Thresholds:
    """Limits by figure.

    norm: ‖W‖/‖W0‖. perplexity: ratio to the base. activation: |ratio to the base − 1|. confident:
    share of the statements that are completed differently now, of those that the unedited model
    completes with confidence. agreement: the same share of all statements, judged only without the
    former: where these are the limits that were asked for, or too few statements are confident.
    Most of a real model's completions are coin tosses, which any change of the weights turns.
    retention: share of the oldest live facts that the model no longer states.
    """

    norm: Limits
    perplexity: Limits
    activation: Limits
    agreement: Limits
    retention: Limits
    confident: Limits | None = None

    def ease_limits(self) -> "Thresholds":
        """Return limits below which the figures are clearly healthy, not just for once."""
        return Thresholds(
            self.norm.ease_limits(1.0),
            self.perplexity.ease_limits(1.0),
            self.activation.ease_limits(0.0),
            self.agreement.ease_limits(0.0),
            self.retention.ease_limits(0.0),
            None if self.confident is None else self.confident.ease_limits(0.0),
        )


# Of the agreement on all statements, where it is judged and nobody has given others.
ALL_STATEMENTS_LIMITS = Limits(0.02, 0.03, 0.10)


@dataclass(frozen=True)
class Verdict:
    """The action to take, and the figures that ask for it."""

    action: Action
    reasons: tuple[str, ...]


def judge_health(
    health: "Health",
    thresholds: Thresholds,
    retention: float | None = None,
    locality: float | None = None,
) -> Verdict:
    """Return the severest verdict of all figures. If they were measured: `retention`, the share of
    the oldest live facts that the model still states; `locality`, that of the replies about edited
    subjects and neighbours that are as before the edits."""
    judged = list(_judge_each(health, thresholds))
    if retention is not None:
        reason = f"of the oldest facts {retention:.3f} are still stated"
        judged.append((thresholds.retention.judge_value(1 - retention), reason))
    if locality is not None and 1 - locality >= LOCALITY_WARN:
        reason = f"of the replies about edited subjects and neighbours {locality:.3f} are as before"
        judged.append((Action.WARN, reason))
    action = max((a for a, _ in judged), default=Action.KEEP)
    return Verdict(action, tuple(reason for a, reason in judged if a > Action.KEEP))


def _judge_each(health: "Health", thresholds: Thresholds) -> Iterator[tuple[Action, str]]:
    if not health.finite:
        yield Action.REVERT, "a number is NaN or infinite"
    for layer, ratio in health.norm_ratio.items():
        reason = f"norm of layer {layer} is {ratio:.3f} of the base"
        yield thresholds.norm.judge_value(ratio), reason
    for layer, ratio in health.activation_ratio.items():
        reason = f"activations of layer {layer} are {ratio:.3f} of the base"
        yield thresholds.activation.judge_value(abs(ratio - 1)), reason
    reason = f"canary perplexity is {health.perplexity_ratio:.3f} of the base"
    yield thresholds.perplexity.judge_value(health.perplexity_ratio), reason
    yield _judge_agreement(health, thresholds)


def _judge_agreement(health: "Health", thresholds: Thresholds) -> tuple[Action, str]:
    share, limits = health.confident_agreement, thresholds.confident
    if share is None or limits is None:
        reason = f"agreement with the base on statements is {health.agreement:.3f}"
        return thresholds.agreement.judge_value(1 - health.agreement), reason
    count = health.confident_statements
    reason = f"agreement with the base on the {count} statements it is sure of is {share:.3f}"
    return limits.judge_value(1 - share), reason


def find_worsened(was: "Health", now: "Health") -> list[str]:
    """List the figures that got worse from one state to another, by more than `TOLERANCE`."""
    found = [] if now.finite else ["a number is NaN or infinite"]
    pairs = [("canary perplexity", was.perplexity, now.perplexity)]
    pairs += [(f"norm of layer {n}", was.norm_ratio[n], now.norm_ratio[n]) for n in was.norm_ratio]
    for name, before, after in pairs:
        if not after <= (1 + TOLERANCE) * before:
            found.append(f"{name} would go from {before:.4g} to {after:.4g}")
    before, after = _select_agreement(was), _select_agreement(now)
    if not after >= before - TOLERANCE:
        found.append(f"agreement would go from {before:.4g} to {after:.4g}")
    return found


def _select_agreement(health: "Health") -> float:
    """Return the agreement on confident statements; on all where those are too few."""
    share = health.confident_agreement
    return health.agreement if share is None else share
