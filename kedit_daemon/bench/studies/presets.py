"""Comparison of all solver presets, on the same terms in the same batches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kedit_daemon.bench.dataset import BenchRecord
from kedit_daemon.bench.measure import COLUMNS, BaseAnswers, read_base_answers
from kedit_daemon.bench.methods.solver_presets import PRESETS, PresetStream
from kedit_daemon.bench.plot import to_percent
from kedit_daemon.bench.studies.shared import (
    catch_unsolved,
    compute_stream_terms,
    format_column_cells,
    format_column_heads,
    format_ratio_cells,
    format_ratio_heads,
    measure_columns,
    measure_figures,
    plot_largest_norms,
    thin_records,
)
from kedit_daemon.bench.studies.study import Study, StudyInput
from kedit_daemon.bench.table import align_rows, format_share
from policies.edit_terms import EditTerms

SHARES = ("oldest_strict", "newest_strict", "locality_strict")
STYLES = dict(zip(SHARES, ("-", ":", "--"), strict=True))


@dataclass(frozen=True)
class PresetStudy(Study):
    """Stream through each preset; a preset whose solve fails ends there."""

    presets: Sequence[str] = tuple(PRESETS)
    curve_points: int = 10  # of each preset, about
    cohort_size: int = 100  # of the oldest facts, and of the newest

    def run(self, given: StudyInput) -> dict[str, Any]:
        """Measure every preset's curve, and its columns at the end."""
        pairs = compute_stream_terms(given)
        records = [record for record, _ in pairs]
        model = given.loaded_model.model
        before = read_base_answers(model, records, given.track)
        near = [record for record in thin_records(records) if record.neighbours]
        near_before = read_base_answers(model, near, given.track)
        rows, ends = list[dict[str, Any]](), dict[str, dict[str, Any]]()
        for name in self.presets:
            failed = list[str]()
            with catch_unsolved(failed):
                for edited in self._edit_stepwise(given, name, [terms for _, terms in pairs]):
                    point = self._measure_point(given, records[:edited], near, near_before)
                    rows.append({"preset": name, "edits": edited, **point})
            columns = None if failed else measure_columns(model, records, before)
            ends[name] = {"columns": columns, "failed": failed[0] if failed else None}
        return {"not_edited": len(given.records) - len(pairs), "presets": ends, "rows": rows}

    def format_lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        rows = [["preset", "edits", *format_ratio_heads(result), *map(_shorten_name, SHARES)]]
        for row in result["rows"]:
            shares = [format_share(row[name]) for name in SHARES]
            rows.append([row["preset"], str(row["edits"]), *format_ratio_cells(row), *shares])
        yield from align_rows(rows)
        yield ""
        ends = [["at the end", *format_column_heads(COLUMNS)]]
        for name, end in result["presets"].items():
            if end["columns"] is not None:
                ends.append([name, *format_column_cells(end["columns"])])
        yield from align_rows(ends)
        yield ""
        for name, end in result["presets"].items():
            if end["failed"]:
                yield f"{name} ended early: {end['failed']}"
        yield f"not edited {result['not_edited']}"

    def draw_curves(self, result: Mapping[str, Any], left: Any, right: Any) -> None:
        for n, name in enumerate(result["presets"]):
            rows = [row for row in result["rows"] if row["preset"] == name]
            edits, color = [row["edits"] for row in rows], f"C{n}"
            plot_largest_norms(left, rows, color, name)
            for measure, style in STYLES.items():
                shares = [to_percent(row[measure]) for row in rows]
                label = _shorten_name(measure) if n == 0 else None  # the left names the colours
                right.plot(edits, shares, style, marker=".", color=color, label=label)
        right.set(xlabel="edits", ylabel="%", ylim=(-2, 102), title="Held, strict")

    def _edit_stepwise(
        self, given: StudyInput, name: str, terms: Sequence[EditTerms]
    ) -> Iterator[int]:
        """Edit batch after batch, and yield the number of edited facts at each curve point."""
        loaded, size = given.loaded_model, given.batch_size
        stream = PresetStream(PRESETS[name], loaded.site, loaded.statistics)
        starts = range(0, len(terms), size)
        every = -(-len(starts) // self.curve_points)
        for number, start in enumerate(given.track(starts, name), 1):
            loaded.model.set_deltas(stream.add(terms[start : start + size]))
            if number % every == 0 or number == len(starts):
                yield min(start + size, len(terms))

    def _measure_point(
        self,
        given: StudyInput,
        edited: Sequence[BenchRecord],
        near: Sequence[BenchRecord],
        before: Sequence[BaseAnswers],
    ) -> dict[str, Any]:
        locality = measure_columns(given.loaded_model.model, near, before)["locality"]
        return {
            **measure_figures(given.loaded_model),
            "oldest_strict": _measure_held(given, edited[: self.cohort_size]),
            "newest_strict": _measure_held(given, edited[-self.cohort_size :]),
            "locality_strict": locality["strict"],
        }


def _measure_held(given: StudyInput, records: Sequence[BenchRecord]) -> float | None:
    """Measure the strict reliability of some facts."""
    bare = [replace(record, paraphrases=(), neighbours=()) for record in records]
    before = [BaseAnswers((), ())] * len(bare)
    return measure_columns(given.loaded_model.model, bare, before)["reliability"]["strict"]


def _shorten_name(name: str) -> str:
    return name.removesuffix("_strict")
