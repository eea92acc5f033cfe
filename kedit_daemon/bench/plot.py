"""A run as a picture: retention by cohort, and the columns; of a sweep what its sizes do. Needs
matplotlib."""

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
    """Raises KeditError when there is nothing to draw with: best asked before a long run."""
    try:
        found = find_spec("matplotlib")
    except ValueError:  # of a module that was imported without a spec
        found = None
    if found is None:
        raise KeditError(
            "matplotlib is not installed, so nothing can be drawn",
            code="no-matplotlib",
            hint="pip install 'kedit-daemon[bench]'",
        )


@contextmanager
def open_figure(path: Path, panels: int = 2) -> Iterator[Any]:
    """So many axes, row by row, to be drawn on within the block; then they are written as PNG."""
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
        raise KeditError(
            f"{path} cannot be written: {error}", code="unwritable", hint="give another --plot"
        ) from error


def draw_result(result: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a run."""
    runs = [result, *([result["baseline"]] if "baseline" in result else [])]
    with open_figure(path) as (left, right):
        if "sweep" in result:
            _draw_sweep_seconds(left, result)
            _draw_sweep_quality(right, result)
        else:
            _draw_retention(left, runs)
            draw_columns(right, runs)


def _draw_retention(axes: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    for n, run in enumerate(runs):
        first = [cohort["first"] for cohort in run["retention"]]
        for measure, line in (("generation", "-"), ("strict", "--")):
            shares = [100 * cohort[measure] for cohort in run["retention"]]
            name = f"{run['method']}, {measure}"
            axes.plot(first, shares, line, marker="o", color=f"C{n}", label=name)
    axes.set(xlabel="first fact of the cohort", ylabel="%", ylim=(-2, 102))
    axes.set_title("Held at the end of the stream")
    axes.legend(fontsize="small")


def draw_columns(axes: Any, runs: Sequence[Mapping[str, Any]]) -> None:
    """The columns of runs, each with its name under `method`."""
    names = [(column, measure) for column in COLUMNS for measure in MEASURES]
    for n, run in enumerate(runs):
        places = [i + (n - (len(runs) - 1) / 2) * BAR_WIDTH for i in range(len(names))]
        known = [run[column][measure] for column, measure in names]
        shares = [math.nan if share is None else 100 * share for share in known]  # no bar
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
            known = [row[column][measure] for row in result["sweep"]]
            shares = [math.nan if share is None else 100 * share for share in known]
            axes.plot(sizes, shares, line, marker="o", color=f"C{n}", label=f"{column}, {measure}")
    _label_size_axes(axes, result, "%")
    axes.set_ylim(-2, 102)


def _label_size_axes(axes: Any, result: Mapping[str, Any], what: str) -> None:
    axes.set(xscale="log", xlabel="facts in a batch", ylabel=what)
    axes.axvline(result["chosen"], color="grey", linestyle=":", label="chosen")
    axes.set_title(f"{result['method']}, {result['facts']} facts")
    axes.legend(fontsize="small")
