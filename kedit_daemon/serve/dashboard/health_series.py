"""How the weights have fared: what audits and new generations measured, as curves."""

import math
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kedit_daemon.serve.dashboard.chart import Chart
from memory.db.queries import fetch_audits, fetch_generations
from policies.stability import Limits, Thresholds


@dataclass(frozen=True)
class Measurement:
    """One measurement: an audit's, or the one before a generation was made active."""

    at: str
    name: str
    generation: int
    verdict: str | None
    figures: dict[str, Any]


def load_measurements(conn: sqlite3.Connection, most: int) -> list[Measurement]:
    """The last measurements, oldest first."""
    found = [
        Measurement(
            row["at"], f"audit {row['id']}", row["generation"], row["verdict"], row["figures"]
        )
        for row in fetch_audits(conn, most)
    ]
    found += [
        Measurement(row["created_at"], f"generation {row['id']}", row["id"], None, row["figures"])
        for row in fetch_generations(conn, most)
        if row["figures"]  # the base was never measured
    ]
    return sorted(found, key=lambda one: one.at)[-most:]


def build_charts(found: Sequence[Measurement], thresholds: Thresholds | None) -> list[Chart]:
    """The figures that are judged, each with its thresholds, where those are known."""
    at: dict[str, Limits] = {} if thresholds is None else vars(thresholds)
    return [
        Chart(
            "norm",
            "Norm of each edited matrix",
            "‖W‖ over ‖W0‖: how long an edited matrix is, against the unedited one.",
            _lines_by_layer(found, "norm_ratio", lambda ratio: ratio),
            _verdict_limits(at.get("norm")),
            1.0,
        ),
        Chart(
            "perplexity",
            "Perplexity",
            "On ordinary text, against the unedited model's.",
            _single_line(found, "perplexity_ratio", "ratio"),
            _verdict_limits(at.get("perplexity")),
            1.0,
        ),
        Chart(
            "activation",
            "Change of activations",
            "How far the mean output of an edited layer on ordinary text is from the base's.",
            _lines_by_layer(found, "activation_ratio", lambda ratio: abs(ratio - 1)),
            _verdict_limits(at.get("activation")),
            0.0,
        ),
        *_build_share_charts(found, at),
    ]


def _build_share_charts(found: Sequence[Measurement], at: Mapping[str, Limits]) -> list[Chart]:
    """The figures that are worse when they are lower."""
    return [
        Chart(
            "agreement",
            "Agreement",
            "Share of unrelated statements that are completed as the unedited model does.",
            _single_line(found, "agreement", "share"),
            _verdict_limits(at.get("agreement"), falling=True),
            1.0,
            falling=True,
        ),
        Chart(
            "retention",
            "Retention",
            "Share of the oldest live facts that are still stated.",
            _single_line(found, "retention", "share"),
            _verdict_limits(at.get("retention"), falling=True),
            1.0,
            falling=True,
        ),
    ]


def _lines_by_layer(
    found: Sequence[Measurement], figure: str, seen: Callable[[float], float]
) -> dict[str, tuple[float | None, ...]]:
    layers = {layer for one in found for layer in one.figures.get(figure) or ()}
    return {
        f"layer {layer}": tuple(
            None
            if (value := _parse_float((one.figures.get(figure) or {}).get(layer))) is None
            # Of an infinite ratio the change is infinite, too.
            else seen(value)
            for one in found
        )
        for layer in sorted(layers, key=lambda name: (len(name), name))
    }


def _single_line(
    found: Sequence[Measurement], figure: str, name: str
) -> dict[str, tuple[float | None, ...]]:
    values = tuple(_parse_float(one.figures.get(figure)) for one in found)
    return {name: values} if any(value is not None for value in values) else {}


def _parse_float(value: object) -> float | None:
    """What the database has of a number: those that JSON lacks are words there."""
    if isinstance(value, str):
        return math.nan
    return float(value) if isinstance(value, int | float) else None


def _verdict_limits(limits: Limits | None, falling: bool = False) -> dict[str, float]:
    """By verdict; `falling`: limits of a share that is lost, as those of the one that is kept."""
    known = {} if limits is None else vars(limits)
    return {name: 1 - limit if falling else limit for name, limit in known.items()}
