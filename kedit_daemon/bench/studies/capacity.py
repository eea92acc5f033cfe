"""Capacity of the weights: joint solves over more and more facts of the stream."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kedit_daemon.bench.measure import COLUMNS, read_base_answers
from kedit_daemon.bench.plot import to_percent
from kedit_daemon.bench.studies.shared import (
    compute_stream_terms,
    format_column_cells,
    format_column_heads,
    format_ratio_cells,
    format_ratio_heads,
    measure_columns,
    measure_figures,
    plot_norms,
    sample_evenly,
)
from kedit_daemon.bench.studies.study import Study, StudyInput
from kedit_daemon.bench.table import align_rows
from policies.edit_terms import pack_terms
from policies.memit_mass import WeightsTier

KNEE_SHARE = 0.95  # of the best size's reliability and locality


@dataclass(frozen=True)
class CapacityStudy(Study):
    """Joint solves over the first n facts of the stream, for growing n."""

    sizes: Sequence[int] = (25, 50, 100, 200, 300, 500, 1000, 2000, 3000, 5000)
    max_asked: int = 300  # facts asked at each size

    def run(self, given: StudyInput) -> dict[str, Any]:
        """Measure columns, norms and the solve's time by size, and find the knee."""
        loaded, model = given.loaded_model, given.loaded_model.model
        pairs = [(record, pack_terms(terms)) for record, terms in compute_stream_terms(given)]
        sizes = [*(n for n in self.sizes if n < len(pairs)), len(pairs)]
        samples = {n: sample_evenly(range(n), self.max_asked) for n in sizes}
        places = sorted({place for sample in samples.values() for place in sample})
        answers = read_base_answers(model, [pairs[place][0] for place in places], given.track)
        before = dict(zip(places, answers, strict=True))
        width = model.base_weight(loaded.layers[0]).shape[1]
        tier, rows = WeightsTier(loaded.site, loaded.statistics), list[dict[str, Any]]()
        for n in given.track(sizes, "sizes"):
            began = time.perf_counter()
            terms_by_id = {record.fact.id: terms for record, terms in pairs[:n]}
            model.set_deltas(tier.solve_deltas(terms_by_id))
            seconds = time.perf_counter() - began
            asked = [pairs[p][0] for p in samples[n]]
            columns = measure_columns(model, asked, [before[p] for p in samples[n]])
            row = {"size": n, "per_width": n / width, "asked": len(asked), **columns}
            rows.append({**row, **measure_figures(loaded), "solve_seconds": seconds})
        missing = len(given.records) - len(pairs)
        return {"not_edited": missing, "width": width, "knee": find_knee(rows), "rows": rows}

    def format_lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        heads = [*format_column_heads(COLUMNS), *format_ratio_heads(result)]
        rows = [["facts", "per d_ff", *heads, "solve, s"]]
        for row in result["rows"]:
            columns = format_column_cells({name: row[name] for name in COLUMNS})
            ratios, seconds = format_ratio_cells(row), f"{row['solve_seconds']:.2f}"
            rows.append([str(row["size"]), f"{row['per_width']:.4f}", *columns, *ratios, seconds])
        yield from align_rows(rows)
        yield ""
        knee = result["knee"]
        text = "none" if knee is None else f"{knee} facts, {knee / result['width']:.4f} per d_ff"
        yield f"knee: {text}; d_ff {result['width']}"
        yield f"not edited {result['not_edited']}"

    def draw_curves(self, result: Mapping[str, Any], left: Any, right: Any) -> None:
        rows = result["rows"]
        across = [row["per_width"] for row in rows]
        for n, column in enumerate(COLUMNS):
            for measure, style in (("strict", "-"), ("generation", "--")):
                shares = [to_percent(row[column][measure]) for row in rows]
                label = f"{column}, {measure}"
                left.plot(across, shares, style, marker=".", color=f"C{n}", label=label)
        if result["knee"] is not None:
            left.axvline(result["knee"] / result["width"], color="grey", label="knee")
        plot_norms(right, across, rows)
        for axes in (left, right):
            axes.set(xlabel="facts per unit of d_ff", xscale="log")
        left.set(ylabel="%", ylim=(-2, 102), title="Held")
        right.set(ylabel="‖W‖ / ‖W0‖", title="Norms")


def find_knee(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """Find the largest size whose strict reliability and locality are both near the best.

    A column without any figure does not count. None if no size qualifies.
    """
    good = {row["size"] for row in rows}
    for column in ("reliability", "locality"):
        known = {r["size"]: r[column]["strict"] for r in rows if r[column]["strict"] is not None}
        if known:
            best = max(known.values())
            good &= {size for size, strict in known.items() if strict >= KNEE_SHARE * best}
    return max(good, default=None)
