import math
from dataclasses import replace
from typing import Any

import pytest

from memory.model.canary import Health
from policies.health_limits import Action, Limits, Thresholds, find_worsened, judge_health

LIMITS = Limits(1.1, 1.2, 1.3)
THRESHOLDS = Thresholds(
    norm=LIMITS,
    perplexity=LIMITS,
    activation=Limits(0.1, 0.2, 0.3),
    agreement=Limits(0.03, 0.06, 0.15),
    retention=Limits(0.03, 0.05, 0.1),
)
WELL: dict[str, Any] = {
    "norm_ratio": {"2": 1.0, "3": 1.0},
    "update_norm": {"2": 0.0, "3": 0.0},
    "activation_ratio": {"2": 1.0, "3": 1.0},
    "perplexity": 10.0,
    "perplexity_ratio": 1.0,
    "agreement": 1.0,
    "kl": 0.0,
    "finite": True,
}


def verdict(**changes: Any) -> tuple[Action, tuple[str, ...]]:
    found = judge_health(Health(**{**WELL, **changes}), THRESHOLDS)
    return found.action, found.reasons


@pytest.mark.parametrize(
    ("value", "action"),
    [
        (0.5, Action.KEEP),
        (1.099, Action.KEEP),
        (1.1, Action.WARN),
        (1.199, Action.WARN),
        (1.2, Action.CONSOLIDATE),
        (1.299, Action.CONSOLIDATE),
        (1.3, Action.REVERT),
        (math.inf, Action.REVERT),
        (math.nan, Action.REVERT),
    ],
)
def test_each_limit_begins_where_it_says(value: float, action: Action) -> None:
    assert LIMITS.judge_value(value) is action
    assert verdict(norm_ratio={"2": value, "3": 1.0})[0] is action
    assert verdict(norm_ratio={"2": 1.0, "3": value})[0] is action
    assert verdict(perplexity_ratio=value)[0] is action


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("change", "action"),
    [
        (0.05, Action.KEEP),
        (0.15, Action.WARN),
        (0.25, Action.CONSOLIDATE),
        (0.35, Action.REVERT),
        (math.nan, Action.REVERT),
    ],
)
def test_activations_may_neither_grow_nor_shrink(change: float, action: Action, sign: int) -> None:
    assert verdict(activation_ratio={"2": 1.0, "3": 1.0 + sign * change})[0] is action


@pytest.mark.parametrize(
    ("share", "action"),
    [
        (0.98, Action.KEEP),
        (0.96, Action.WARN),
        (0.93, Action.CONSOLIDATE),
        (0.80, Action.REVERT),
        (math.nan, Action.REVERT),
    ],
)
def test_a_loss_of_agreement_is_worse_the_larger_it_is(share: float, action: Action) -> None:
    found, reasons = verdict(agreement=share)
    assert found is action
    assert reasons == ((f"agreement with the base on statements is {share:.3f}",) if action else ())


@pytest.mark.parametrize(
    ("share", "action"),
    [
        (0.995, Action.KEEP),
        (0.985, Action.WARN),
        (0.975, Action.CONSOLIDATE),
        (0.95, Action.REVERT),
        (math.nan, Action.REVERT),
    ],
)
def test_confident_statements_are_judged_and_not_the_coin_tosses(
    share: float, action: Action
) -> None:
    thresholds = replace(THRESHOLDS, confident=Limits(0.01, 0.02, 0.04))
    health = Health(**WELL, confident_agreement=share, confident_statements=138)
    found = judge_health(replace(health, agreement=0.5), thresholds)
    assert found.action is action
    reason = f"agreement with the base on the 138 statements it is sure of is {share:.3f}"
    assert found.reasons == ((reason,) if action else ())


def test_all_statements_are_judged_where_few_are_confident_or_only_they_have_limits() -> None:
    health = Health(**{**WELL, "agreement": 0.96}, confident_agreement=0.5)
    assert judge_health(health, THRESHOLDS).action is Action.WARN
    few = replace(health, confident_agreement=None, confident_statements=12)
    confident = replace(THRESHOLDS, confident=Limits(0.001, 0.002, 0.003))
    assert judge_health(few, confident).action is Action.WARN
    assert judge_health(health, confident).action is Action.REVERT


def test_all_well_is_kept_without_a_reason() -> None:
    assert verdict() == (Action.KEEP, ())


def test_the_severest_counts_and_every_reason_is_told() -> None:
    action, reasons = verdict(
        norm_ratio={"2": 1.15, "3": 1.0}, perplexity_ratio=1.25, activation_ratio={"2": 1.12}
    )
    assert action is Action.CONSOLIDATE
    assert len(reasons) == 3
    assert any("norm of layer 2 is 1.150" in reason for reason in reasons)
    assert any("perplexity is 1.250" in reason for reason in reasons)
    assert not any("layer 3" in reason for reason in reasons)


def test_a_number_that_is_not_finite_is_reverted_whatever_the_limits() -> None:
    action, reasons = verdict(finite=False)
    assert action is Action.REVERT
    assert reasons == ("a number is NaN or infinite",)


def test_a_verdict_reads_as_a_word() -> None:
    assert [str(a) for a in sorted(Action)] == ["keep", "warn", "consolidate", "revert"]


@pytest.mark.parametrize(
    ("share", "action"),
    [(1.0, Action.KEEP), (0.96, Action.WARN), (0.94, Action.CONSOLIDATE), (0.5, Action.REVERT)],
)
def test_facts_that_are_not_stated_any_more_count(share: float, action: Action) -> None:
    found = judge_health(Health(**WELL), THRESHOLDS, share)
    assert found.action is action
    reasons = (f"of the oldest facts {share:.3f} are still stated",)
    assert found.reasons == (reasons if action else ())


def test_eased_limits_lie_nearer_to_rest() -> None:
    eased = THRESHOLDS.ease_limits()
    assert tuple(vars(eased.norm).values()) == pytest.approx((1.09, 1.18, 1.27))
    assert eased.perplexity == eased.norm
    assert tuple(vars(eased.activation).values()) == pytest.approx((0.09, 0.18, 0.27))
    assert eased.agreement.warn == pytest.approx(0.027)
    assert eased.retention.revert == pytest.approx(0.09)
    assert eased.confident is None
    confident = replace(THRESHOLDS, confident=Limits(0.01, 0.02, 0.04)).ease_limits().confident
    assert confident is not None
    assert tuple(vars(confident).values()) == pytest.approx((0.009, 0.018, 0.036))


def test_only_what_gets_worse_by_more_than_chance_is_worse() -> None:
    was = Health(**WELL)
    assert find_worsened(was, was) == []
    better = {"perplexity": 8.0, "norm_ratio": {"2": 0.5, "3": 0.9}}
    assert find_worsened(was, Health(**{**WELL, **better})) == []
    near = {"perplexity": 10.09, "norm_ratio": {"2": 1.009, "3": 1.0}, "agreement": 0.991}
    assert find_worsened(was, Health(**{**WELL, **near})) == []
    far: dict[str, Any] = {
        "perplexity": math.nan,
        "norm_ratio": {"2": 1.0, "3": 1.02},
        "agreement": 0.98,
        "finite": False,
    }
    assert find_worsened(was, Health(**{**WELL, **far})) == [
        "a number is NaN or infinite",
        "canary perplexity would go from 10 to nan",
        "norm of layer 3 would go from 1 to 1.02",
        "agreement would go from 1 to 0.98",
    ]


def test_a_consolidation_is_compared_on_the_confident_statements() -> None:
    was = Health(**WELL, confident_agreement=1.0, confident_statements=138)
    coin_tosses = replace(was, agreement=0.8, confident_agreement=1 - 1 / 138)
    assert find_worsened(was, coin_tosses) == []
    worse = replace(was, confident_agreement=1 - 2 / 138)
    assert find_worsened(was, worse) == ["agreement would go from 1 to 0.9855"]
