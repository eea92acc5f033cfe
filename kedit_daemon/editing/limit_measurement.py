"""Measurement of a model's limits: roundings of its weights, and an update that is scaled up."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from kedit_daemon.editing.model_loading import read_canary_texts
from memory.model.canary import MIN_CONFIDENT_STATEMENTS, Canary
from memory.model.editable import EditableModel
from policies.edit_site import EditSite
from policies.health_limits import Limits
from policies.measured_limits import (
    ACTIVATION_RANGE,
    MAX_CHANGED_SHARE,
    MIN_CHANGED,
    NORM_RANGE,
    PERPLEXITY_RANGE,
    derive_activation_limits,
    derive_agreement_limits,
    derive_norm_limits,
    derive_perplexity_limits,
)
from policies.rounding import RoundingEffect, measure_rounding

UPDATE_SCALES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)


def _describe_range(bounds: tuple[Limits, Limits]) -> str:
    return f"from {vars(bounds[0])} to {vars(bounds[1])}"


LIMIT_RULES = {
    "confident": "the share of the statements that the unedited model completes with confidence"
    " which rounding the weights to 8, 6 and 5 bits changes, the widths' counts pooled, since it"
    f" halves with each bit; at least {MIN_CHANGED} statements, at most {vars(MAX_CHANGED_SHARE)}",
    "agreement": "the same of all statements, and only where fewer than"
    f" {MIN_CONFIDENT_STATEMENTS} are completed with confidence",
    "perplexity": "the perplexity ratio after rounding to 8, 6 and 5 bits,"
    f" {_describe_range(PERPLEXITY_RANGE)}",
    "activation": "the change of the activation norms by rounding to 8, 6 and 5 bits, or 1, 2 and 4"
    " times their largest difference between two halves of the canary text, whichever is larger,"
    f" {_describe_range(ACTIVATION_RANGE)}",
    "norm": "the norm ratio at which the pilot's update, scaled up, moves the activation norms by"
    f" their limits, {_describe_range(NORM_RANGE)}",
}


def measure_limits(
    model: EditableModel, site: EditSite, deltas: Mapping[int, Tensor]
) -> tuple[EditSite, dict[str, Any]]:
    """Derive the limits of an unedited model's site by LIMIT_RULES. Return the site with them and
    with the KL of each rounding, and the figures used. deltas: the pilot's update ΔW by layer."""
    texts = read_canary_texts()
    canary = Canary(model, texts.lines, site.layers, texts.statements)
    effects = measure_rounding(canary)
    figure, agreement = _derive_agreement_limits(canary, effects)
    halves = [Canary(model, texts.lines[n::2], site.layers) for n in range(2)]
    one, other = (half.base_readings.activation_norms for half in halves)
    variation = {n: 2 * abs(one[n] - other[n]) / (one[n] + other[n]) for n in site.layers}
    activation = derive_activation_limits(effects, max(variation.values()))
    curve = _measure_curve(model, halves[0], deltas, activation.revert)
    limits = {
        figure: agreement,
        "perplexity": derive_perplexity_limits(effects),
        "activation": activation,
        "norm": derive_norm_limits(curve, activation),
    }
    return _set_limits(site, limits, effects), {
        "confident_statements": sum(canary.is_confident),
        "agreement_counted_on": figure,
        "rounding": [effect.as_dict() for effect in effects],
        "activation_variation": variation,
        "norm_and_activation_change": [list(point) for point in curve],
    }


def _derive_agreement_limits(
    canary: Canary, effects: Sequence[RoundingEffect]
) -> tuple[str, Limits]:
    """Return the figure that is judged, which is of all statements where too few are confident, and
    its limits."""
    sure, count = sum(canary.is_confident), len(canary.is_confident)
    if sure >= MIN_CONFIDENT_STATEMENTS:
        return "confident", derive_agreement_limits(effects, sure, confident=True)
    return "agreement", derive_agreement_limits(effects, count, confident=False)


def _set_limits(
    site: EditSite, limits: Mapping[str, Limits], effects: Sequence[RoundingEffect]
) -> EditSite:
    # Limits for all statements, as older versions wrote them, would be judged before the new ones.
    bare = replace(site, agreement_warn=None, agreement_consolidate=None, agreement_revert=None)
    named = [(f, verdict, n) for f, levels in limits.items() for verdict, n in vars(levels).items()]
    return replace(
        bare,
        rounding_kl={effect.bits: effect.kl for effect in effects},
        **{f"{figure}_{verdict}": limit for figure, verdict, limit in named},
    )


def _measure_curve(
    model: EditableModel, canary: Canary, deltas: Mapping[int, Tensor], far: float
) -> list[tuple[float, float]]:
    """Measure the largest norm ratio and activation change under the update, scaled up until the
    activations have changed by `far`."""
    curve: list[tuple[float, float]] = []
    try:
        for scale in UPDATE_SCALES:
            model.set_deltas({n: scale * delta for n, delta in deltas.items()})
            health = canary.measure_health()
            if not health.finite:
                break
            change = max(abs(ratio - 1) for ratio in health.activation_ratio.values())
            curve.append((max(health.norm_ratio.values()), change))
            if change >= far:
                break
    finally:
        model.set_deltas({})
    return curve
