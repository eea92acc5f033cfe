"""The health of the weights over time, as charts of what audits and new generations measured."""

import math
import sqlite3
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kedit_daemon.serve.dashboard.chart import Chart
from memory.db.queries import fetch_audits, fetch_generations
from policies.health_limits import Limits, Thresholds


@dataclass(frozen=True)
class Measurement:
    """The figures of an audit, or those taken before a generation was made active."""

    at: str
    name: str
    generation: int
    verdict: str | None
    figures: dict[str, Any]


# By figure: title and meaning.
_SHARES = {
    "confident_agreement": (
        "Agreement",
        "Share of unrelated statements that are completed as by the unedited model, of those that"
        " it completes with confidence.",
    ),
    "agreement": (
        "Agreement on all statements",
        "The same share of all statements, of which many are coin tosses to the unedited model.",
    ),
    "retention": ("Retention", "Share of the oldest live facts that are still stated."),
}


def load_measurements(conn: sqlite3.Connection, limit: int) -> list[Measurement]:
    """Load the last measurements, oldest first."""
    audits = [
        Measurement(
            row["at"], f"audit {row['id']}", row["generation"], row["verdict"], row["figures"]
        )
        for row in fetch_audits(conn, limit)
    ]
    generations = [
        Measurement(row["created_at"], f"generation {row['id']}", row["id"], None, row["figures"])
        for row in fetch_generations(conn, limit)
        if row["figures"]  # the base was never measured
    ]
    return sorted(audits + generations, key=lambda one: one.at)[-limit:]


def build_charts(measurements: Sequence[Measurement], thresholds: Thresholds | None) -> list[Chart]:
    """Build the charts of the judged figures, with their thresholds where those are known."""
    is_sure = any(m.figures.get("confident_agreement") is not None for m in measurements)
    limits = {} if thresholds is None else _list_limits(thresholds, is_sure)
    shares = {k: v for k, v in _SHARES.items() if is_sure or k != "confident_agreement"}
    return [
        Chart(
            "norm",
            "Norm of each edited matrix",
            "‖W‖ over ‖W0‖: the norm of an edited matrix over that of the unedited one.",
            _lines_by_layer(measurements, "norm_ratio", lambda ratio: ratio),
            _verdict_limits(limits.get("norm")),
            1.0,
        ),
        Chart(
            "perplexity",
            "Perplexity",
            "On ordinary text, over the unedited model's.",
            _single_line(measurements, "perplexity_ratio", "ratio"),
            _verdict_limits(limits.get("perplexity")),
            1.0,
        ),
        Chart(
            "activation",
            "Change of activations",
            "Distance of an edited layer's mean output on ordinary text from the base's.",
            _lines_by_layer(measurements, "activation_ratio", lambda ratio: abs(ratio - 1)),
            _verdict_limits(limits.get("activation")),
            0.0,
        ),
        *(
            Chart(
                key,
                title,
                about,
                _single_line(measurements, key, "share"),
                _verdict_limits(limits.get(key), falling=True),
                1.0,
                falling=True,
            )
            for key, (title, about) in shares.items()
        ),
    ]


def _list_limits(thresholds: Thresholds, is_sure: bool) -> dict[str, Limits | None]:
    """Return the limits by figure; of the two agreements only the judged one has any. `is_sure`:
    that on confident statements was measured."""
    limits: dict[str, Limits | None] = dict(vars(thresholds))
    confident = limits.pop("confident")
    if is_sure and confident is not None:
        limits |= {"agreement": None, "confident_agreement": confident}
    return limits


def _lines_by_layer(
    measurements: Sequence[Measurement], figure: str, convert: Callable[[float], float]
) -> dict[str, tuple[float | None, ...]]:
    by_layer = [one.figures.get(figure) or {} for one in measurements]
    layers = sorted({layer for values in by_layer for layer in values}, key=_layer_order)
    return {
        f"layer {layer}": tuple(
            None if (value := _parse_float(values.get(layer))) is None else convert(value)
            for values in by_layer
        )
        for layer in layers
    }


def _layer_order(layer: str) -> tuple[int, str]:
    return len(layer), layer  # numbers as text


def _single_line(
    measurements: Sequence[Measurement], figure: str, name: str
) -> dict[str, tuple[float | None, ...]]:
    values = tuple(_parse_float(one.figures.get(figure)) for one in measurements)
    return {name: values} if any(value is not None for value in values) else {}


def _parse_float(value: object) -> float | None:
    """Parse a number of the database, which stores NaN and infinity as text."""
    if isinstance(value, str):
        return math.nan
    return float(value) if isinstance(value, int | float) else None


def _verdict_limits(limits: Limits | None, falling: bool = False) -> dict[str, float]:
    """Return verdict -> limit; `falling`: turn limits of the lost share into the kept share."""
    known = {} if limits is None else vars(limits)
    return {name: 1 - limit if falling else limit for name, limit in known.items()}
