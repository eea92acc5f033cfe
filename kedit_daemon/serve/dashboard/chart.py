"""Layout of charts: the position of each point, tick and threshold. A template draws the SVG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 560.0, 260.0
LEFT, RIGHT, TOP, BOTTOM = 60.0, 14.0, 16.0, 30.0  # margins, in the drawing's units
TICK_COUNT = 4  # about
HEADROOM = 0.06  # of the range, above and below


@dataclass(frozen=True)
class Chart:
    """A figure over a number of measurements.

    lines: name -> one value per measurement; None: not measured, NaN: not finite. limits: verdict
    -> threshold. base_value: of the unedited model. falling: whether lower is worse.
    """

    key: str
    title: str
    about: str
    lines: Mapping[str, tuple[float | None, ...]]
    limits: Mapping[str, float]
    base_value: float
    falling: bool = False

    @property
    def latest(self) -> dict[str, float]:
        """The last value of each line."""
        taken = {name: [v for v in values if v is not None] for name, values in self.lines.items()}
        return {name: values[-1] for name, values in taken.items() if values}

    @property
    def worst(self) -> tuple[str, float] | None:
        """The name and last value of the line that is worst now."""
        sign = -1 if self.falling else 1

        def badness(line: tuple[str, float]) -> float:
            return math.inf if math.isnan(line[1]) else sign * line[1]

        return max(self.latest.items(), key=badness, default=None)


@dataclass(frozen=True)
class Dot:
    """A value in the drawing; `index` is the number of its measurement."""

    x: float
    y: float
    value: float
    index: int


@dataclass(frozen=True)
class Curve:
    """A line: runs of dots, with a gap at a value that is not finite."""

    name: str
    runs: tuple[tuple[Dot, ...], ...]


@dataclass(frozen=True)
class Level:
    """A horizontal line: a tick or a threshold."""

    y: float
    name: str


@dataclass(frozen=True)
class Drawing:
    """A chart's layout; `beyond` are the limits outside of the range."""

    curves: tuple[Curve, ...]
    ticks: tuple[Level, ...]
    limits: tuple[Level, ...]
    beyond: tuple[str, ...]
    base_y: float | None
    first_x: float
    last_x: float


def draw_chart(chart: Chart, close: bool) -> Drawing:
    """Lay a chart out: up to the next limit, or `close` around the measured values."""
    low, high = _value_range(chart, close)
    count = max((len(values) for values in chart.lines.values()), default=0)

    def x(index: int) -> float:
        span = WIDTH - LEFT - RIGHT
        return round(LEFT + (span * index / (count - 1) if count > 1 else span / 2), 1)

    def y(value: float) -> float:
        share = (value - low) / (high - low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    def dots(run: Sequence[tuple[int, float]]) -> tuple[Dot, ...]:
        return tuple(Dot(x(n), y(value), value, n) for n, value in run)

    names = {name: f"{name} {_format_number(limit)}" for name, limit in chart.limits.items()}
    within = {name: limit for name, limit in chart.limits.items() if low <= limit <= high}
    return Drawing(
        curves=tuple(
            Curve(name, tuple(dots(run) for run in _split_runs(values)))
            for name, values in chart.lines.items()
        ),
        ticks=tuple(Level(y(tick), _format_number(tick)) for tick in _compute_ticks(low, high)),
        limits=tuple(Level(y(limit), names[name]) for name, limit in within.items()),
        beyond=tuple(text for name, text in names.items() if name not in within),
        base_y=y(chart.base_value) if low <= chart.base_value <= high else None,
        first_x=x(0),
        last_x=x(max(count - 1, 0)),
    )


def _split_runs(values: Sequence[float | None]) -> list[list[tuple[int, float]]]:
    """Return runs of (index, value), split at values that are not finite; None is skipped."""
    runs: list[list[tuple[int, float]]] = [[]]
    for index, value in enumerate(values):
        if value is not None and math.isfinite(value):
            runs[-1].append((index, value))
        elif value is not None:
            runs.append([])
    return [run for run in runs if run]


def _value_range(chart: Chart, close: bool) -> tuple[float, float]:
    """Return the range of the measured values; in full view also of the base value, the limits
    that were passed, and the next limit."""
    values = [v for line in chart.lines.values() for v in line if v is not None]
    shown = [v for v in values if math.isfinite(v)] or [chart.base_value]
    if not close:
        shown.append(chart.base_value)

        def distance(value: float) -> float:
            return abs(value - chart.base_value)

        farthest = max(map(distance, shown))
        limits = sorted(chart.limits.values(), key=distance)
        passed = [limit for limit in limits if distance(limit) <= farthest]
        shown += limits[: len(passed) + 1]
    low, high = min(shown), max(shown)
    margin = HEADROOM * (high - low) or max(abs(high), 1.0) * 0.01
    return low - margin, high + margin


def _compute_ticks(low: float, high: float) -> list[float]:
    """Return round numbers within the range."""
    rough = (high - low) / TICK_COUNT
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step) + 1)]


def _format_number(value: float) -> str:
    return f"{value + 0.0:.5g}"  # no minus zero
