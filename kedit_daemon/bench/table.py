"""Text output of a run: a table of its columns, and its other figures."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kedit_daemon.bench.measure import COLUMNS, MEASURES
from kedit_daemon.system.sanitize import clean_text

NAME_WIDTH, CELL_WIDTH = 16, 11
SHOWN_MEASURES = ("strict", "generation")  # of MEASURES, in the tables of sweeps and studies


def format_result(result: Mapping[str, Any]) -> Iterator[str]:
    """Format a run's columns, the baseline's below them, then the figures of both; or a sweep."""
    if "sweep" in result:
        yield from _format_sweep(result)
        return
    runs = [result, *([result["baseline"]] if "baseline" in result else [])]
    yield from format_columns(runs)
    for run in runs:
        yield ""
        yield from _format_figures(run)


def format_columns(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Format the columns of runs, each with its name under `method`."""
    yield _format_row("", "", *MEASURES)
    for run in runs:
        for number, column in enumerate(COLUMNS):
            name = run["method"] if number == 0 else ""
            yield _format_row(name, column, *(format_share(run[column][m]) for m in MEASURES))


def align_rows(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Align rows of the same length: the first column to the left, the others to the right."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for first, *rest in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(rest, widths[1:], strict=True)]
        yield "  ".join([f"{first:<{widths[0]}}", *cells]).rstrip()


def _format_row(*cells: str) -> str:
    first, second, *rest = cells
    line = f"{first:<{NAME_WIDTH}}{second:<{NAME_WIDTH}}"
    return (line + "".join(f"{cell:>{CELL_WIDTH}}" for cell in rest)).rstrip()


def format_share(value: float | None) -> str:
    """Format a share in per cent; a dash if it was not measured."""
    return "-" if value is None else f"{100 * value:.1f}"


def _format_figures(run: Mapping[str, Any]) -> Iterator[str]:
    seconds, perplexity = run["seconds_per_fact"], run["perplexity"]
    batch, model = f"batches of {run['batch_size']}", clean_text(run["model"])
    yield f"{run['method']}: {run['facts']} facts, {batch}, seed {run['seed']}, on {model}"
    yield f"  not edited        {run['not_edited']}, records skipped {run['skipped']}"
    cohorts = [
        f"{c['first']}-{c['first'] + c['facts'] - 1}: {format_share(c['strict'])}"
        f" / {format_share(c['generation'])}"
        for c in run["retention"]
    ]
    yield f"  retention         {', '.join(cohorts)} (strict / generation, oldest first)"
    yield f"  perplexity        {perplexity['before']:.3f} -> {perplexity['after']:.3f}"
    ratios = [f"{name} {ratio:.4f}" for name, ratio in run["norm_ratio"].items()]
    yield f"  norm ratio        {', '.join(ratios)}"
    parts = [f"{name} {spent:.3f}" for name, spent in seconds["parts"].items()]
    spent = f" ({', '.join(parts)})" if parts else ""
    yield f"  seconds per fact  median {seconds['median']:.3f}, p95 {seconds['p95']:.3f}{spent}"
    yield f"  bytes per fact    {run['bytes_per_fact']:.0f}"
    yield f"  peak memory       {run['peak_memory_bytes'] / 2**20:.0f} MiB"
    yield f"  commit, device    {run['commit']}, {run['device']}"


def _format_sweep(result: Mapping[str, Any]) -> Iterator[str]:
    """Format a line for each batch size, then the fitted curve and the choice."""
    run = result["sweep"][0]
    model, seed = clean_text(run["model"]), run["seed"]
    yield f"{result['method']}: {result['facts']} facts, seed {seed}, on {model}"
    cells = [(column, measure) for column in COLUMNS for measure in SHOWN_MEASURES]
    heads = [f"{column[:3]}. {measure[:3]}" for column, measure in cells]
    yield _format_sweep_row("batch", "median s", "s/fact", *heads, "perplexity", "norm")
    for row in result["sweep"]:
        shares = [format_share(row[column][measure]) for column, measure in cells]
        seconds, norm = row["seconds_per_fact"], max(row["norm_ratio"].values())
        figures = [f"{row['perplexity']['after']:.3f}", f"{norm:.4f}"]
        times = [f"{seconds['median']:.3f}", f"{seconds['mean']:.3f}"]
        yield _format_sweep_row(str(row["batch_size"]), *times, *shares, *figures)
    curve = result["curve"]
    yield ""
    yield f"seconds of a fact   {curve['per_fact']:.3f} + {curve['per_batch']:.3f} / batch size"
    yield f"chosen              batches of {result['chosen']}"


def _format_sweep_row(first: str, *rest: str) -> str:
    return f"{first:<6}" + "".join(f"{cell:>{CELL_WIDTH}}" for cell in rest)
