"""Plots of a run: retention by cohort, and the columns; of a sweep, by batch size."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kedit_daemon.bench.measure import COLUMNS, MEASURES
from memory.errors import KeditError

PANEL_WIDTH, PANEL_HEIGHT = 5.5, 4.2  # inches, of one panel
MAX_PANELS_ACROSS = 3  # panels side by side, at most
BAR_WIDTH = 0.38


def require_matplotlib() -> None:
    """Raise KeditError if matplotlib is missing, to be called before a long run."""
    try:
        spec = find_spec("matplotlib")
    except ValueError:  # raised for a module that was imported without a spec
        spec = None
    if spec is None:
        why = "matplotlib is not installed, so nothing can be drawn"
        hint = "pip install 'kedit-daemon[bench]'"
        raise KeditError(why, code="no-matplotlib", hint=hint)


@contextmanager
def open_figure(path: Path, panels: int = 2) -> Iterator[Any]:
    """Yield `panels` axes, row by row, to draw on within the block; then write them as PNG."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(panels, MAX_PANELS_ACROSS)
    rows = math.ceil(panels / across)
    figure = Figure(figsize=(PANEL_WIDTH * across, PANEL_HEIGHT * rows), layout="constrained")
    FigureCanvasAgg(figure)
    yield list(figure.subplots(rows, across, squeeze=False).flat)
    try:
        figure.savefig(path, format="png", dpi=120)
    except OSError as error:
        why = f"{path} cannot be written: {error}"
        raise KeditError(why, code="unwritable", hint="give another --plot") from error


def draw_result(result: Mapping[str, Any], path: Path) -> None:
    """Draw a run or a sweep, as PNG."""
    runs = [result, *([result["baseline"]] if "baseline" in result else [])]
    with open_figure(path) as (left, right):
        if "sweep" in result:
            _draw_sweep_seconds(left, result)
            _draw_sweep_quality(right, result)
        else:
            _draw_retention(left, runs)
            draw_columns(right, runs)


def to_percent(value: float | None) -> float:
    """Convert a share to per cent; NaN, which is not drawn, if it was not measured."""
    return math.nan if value is None else 100 * value


def _draw_retention(axes: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    for n, run in enumerate(runs):
        first = [cohort["first"] for cohort in run["retention"]]
        for measure, line in (("generation", "-"), ("strict", "--")):
            shares = [100 * cohort[measure] for cohort in run["retention"]]
            label = f"{run['method']}, {measure}"
            axes.plot(first, shares, line, marker="o", color=f"C{n}", label=label)
    axes.set(xlabel="first fact of the cohort", ylabel="%", ylim=(-2, 102))
    axes.set_title("Held at the end of the stream")
    axes.legend(fontsize="small")


def draw_columns(axes: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    """Draw the columns of runs as bars, each with its name under `method`."""
    names = [(column, measure) for column in COLUMNS for measure in MEASURES]
    for n, run in enumerate(runs):
        places = [i + (n - (len(runs) - 1) / 2) * BAR_WIDTH for i in range(len(names))]
        shares = [to_percent(run[column][measure]) for column, measure in names]
        axes.bar(places, shares, BAR_WIDTH, label=run["method"])
    axes.set_xticks(range(len(names)), [f"{c[:3]}. {m}" for c, m in names], rotation=60)
    axes.set(ylabel="%", ylim=(0, 102))
    axes.set_title("Reliability, generality, locality")
    axes.legend(fontsize="small", loc="lower left")


def _draw_sweep_seconds(axes: Any, result: Mapping[str, Any]) -> None:
    curve = result["curve"]
    sizes = [row["batch_size"] for row in result["sweep"]]
    for name in ("mean", "median"):
        spent = [row["seconds_per_fact"][name] for row in result["sweep"]]
        axes.plot(sizes, spent, "o" if name == "mean" else "x", label=name)
    fitted = [curve["per_fact"] + curve["per_batch"] / size for size in sizes]
    axes.plot(sizes, fitted, label="fitted to the means")
    _label_size_axes(axes, result, "seconds of a fact")
    axes.set_ylim(bottom=0)


def _draw_sweep_quality(axes: Any, result: Mapping[str, Any]) -> None:
    sizes = [row["batch_size"] for row in result["sweep"]]
    for n, column in enumerate(COLUMNS):
        for measure, line in (("generation", "-"), ("strict", "--")):
            shares = [to_percent(row[column][measure]) for row in result["sweep"]]
            axes.plot(sizes, shares, line, marker="o", color=f"C{n}", label=f"{column}, {measure}")
    _label_size_axes(axes, result, "%")
    axes.set_ylim(-2, 102)


def _label_size_axes(axes: Any, result: Mapping[str, Any], what: str) -> None:
    axes.set(xscale="log", xlabel="facts in a batch", ylabel=what)
    axes.axvline(result["chosen"], color="grey", linestyle=":", label="chosen")
    axes.set_title(f"{result['method']}, {result['facts']} facts")
    axes.legend(fontsize="small")
