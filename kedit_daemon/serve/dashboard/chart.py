"""Curves of figures over time: where each point, tick and threshold lies in a drawing.

It draws nothing itself: a template turns what it says into SVG.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 560.0, 260.0
LEFT, RIGHT, TOP, BOTTOM = 60.0, 14.0, 16.0, 30.0  # margins, in the drawing's units
TICK_COUNT = 4  # about so many
HEADROOM = 0.06  # of the range, above and below


@dataclass(frozen=True)
class Chart:
    """A figure over a number of measurements.

    lines: by name, one value a measurement; None where it was not taken, NaN where it was no
    number. limits: by verdict, from where on it is given. rest: the unedited model's value.
    falling: whether lower is worse.
    """

    key: str
    title: str
    about: str
    lines: Mapping[str, tuple[float | None, ...]]
    limits: Mapping[str, float]
    rest: float
    falling: bool = False

    @property
    def latest(self) -> dict[str, float]:
        """The last value of each line."""
        taken = {name: [v for v in values if v is not None] for name, values in self.lines.items()}
        return {name: values[-1] for name, values in taken.items() if values}

    @property
    def worst(self) -> tuple[str, float] | None:
        """The line that is worst now, and its value."""
        found = self.latest.items()
        if not found:
            return None
        sign = -1 if self.falling else 1
        return max(found, key=lambda one: math.inf if math.isnan(one[1]) else sign * one[1])


@dataclass(frozen=True)
class Dot:
    """One value in the drawing; `place` is which measurement it is of."""

    x: float
    y: float
    value: float
    place: int


@dataclass(frozen=True)
class Curve:
    """One line: runs of dots, with a gap where a value was no number."""

    name: str
    runs: tuple[tuple[Dot, ...], ...]


@dataclass(frozen=True)
class Level:
    """A horizontal line: a tick or a threshold."""

    y: float
    name: str


@dataclass(frozen=True)
class Drawing:
    """Everything that is to be drawn; `beyond` are the limits outside of the range."""

    curves: tuple[Curve, ...]
    ticks: tuple[Level, ...]
    limits: tuple[Level, ...]
    beyond: tuple[str, ...]
    rest: float | None
    first_x: float
    last_x: float


def draw_chart(chart: Chart, close: bool) -> Drawing:
    """Lay a chart out. With the next limit above what was measured; or `close` up, without."""
    low, high = _value_range(chart, close)
    count = max((len(values) for values in chart.lines.values()), default=0)

    def x(place: int) -> float:
        span = WIDTH - LEFT - RIGHT
        return round(LEFT + (span * place / (count - 1) if count > 1 else span / 2), 1)

    def y(value: float) -> float:
        part = (value - low) / (high - low)
        return round(HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM), 1)

    within = {name: limit for name, limit in chart.limits.items() if low <= limit <= high}
    curves = []
    for name, values in chart.lines.items():
        dots = [None if v is None else (x(n), v, n) for n, v in enumerate(values)]
        taken = [dot for dot in dots if dot is not None]
        runs = [[Dot(a, y(v), v, n) for a, v, n in run] for run in _split_runs(taken)]
        curves.append(Curve(name, tuple(map(tuple, runs))))
    return Drawing(
        curves=tuple(curves),
        ticks=tuple(Level(y(tick), _format_number(tick)) for tick in _compute_ticks(low, high)),
        limits=tuple(Level(y(v), f"{name} {_format_number(v)}") for name, v in within.items()),
        beyond=tuple(
            f"{n} {_format_number(v)}" for n, v in chart.limits.items() if n not in within
        ),
        rest=y(chart.rest) if low <= chart.rest <= high else None,
        first_x=x(0),
        last_x=x(max(count - 1, 0)),
    )


def _split_runs(
    dots: Sequence[tuple[float, float, int]],
) -> list[list[tuple[float, float, int]]]:
    """Split where a value is no number."""
    runs: list[list[tuple[float, float, int]]] = [[]]
    for dot in dots:
        if math.isfinite(dot[1]):
            runs[-1].append(dot)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _value_range(chart: Chart, close: bool) -> tuple[float, float]:
    """From what was measured, the resting value, and in full view the limits up to the next."""
    values = [v for line in chart.lines.values() for v in line if v is not None]
    shown = [v for v in values if math.isfinite(v)] or [chart.rest]
    if not close:
        shown.append(chart.rest)
        most = max(abs(v - chart.rest) for v in shown)
        further = [v for v in chart.limits.values() if abs(v - chart.rest) > most]
        reached = [v for v in chart.limits.values() if abs(v - chart.rest) <= most]
        shown += [*reached, *sorted(further, key=lambda v: abs(v - chart.rest))[:1]]
    low, high = min(shown), max(shown)
    room = HEADROOM * (high - low) or max(abs(high), 1.0) * 0.01
    return low - room, high + room


def _compute_ticks(low: float, high: float) -> list[float]:
    """Round numbers within the range."""
    rough = (high - low) / TICK_COUNT
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step) + 1)]


def _format_number(value: float) -> str:
    return f"{value + 0.0:.5g}"  # no minus before nothing
