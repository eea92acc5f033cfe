"""Churn: effect on the weights of superseding facts again and again, jointly solved or stacked."""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kedit_daemon.bench.dataset import BenchRecord, split_batches
from kedit_daemon.bench.measure import BaseAnswers, read_base_answers
from kedit_daemon.bench.methods.daemon_tiers import MemitMass
from kedit_daemon.bench.methods.solver_presets import PRESETS, PresetStream
from kedit_daemon.bench.plot import to_percent
from kedit_daemon.bench.studies.shared import (
    OtherTargets,
    catch_unsolved,
    format_ratio_cells,
    format_ratio_heads,
    load_terms,
    measure_columns,
    measure_figures,
    plot_largest_norms,
    thin_records,
)
from kedit_daemon.bench.studies.study import Study, StudyInput
from kedit_daemon.bench.table import align_rows, format_share
from memory.facts import Fact

STACKED_PRESET = "memit"  # preset that stacks the same terms
SHARES = ("reliability_strict", "reliability_generation", "locality_strict")
WAYS = ("replaced", "stacked")


@dataclass(frozen=True)
class ChurnStudy(Study):
    """Every fact superseded in every round, by the daemon's flush and stacked."""

    rounds: int = 20

    def run(self, given: StudyInput) -> dict[str, Any]:
        """Measure both ways, round by round."""
        with given.open_method(MemitMass, has_policy=False) as home:
            rows, failed = _run_rounds(given, home, self.rounds)
        return {
            "not_edited": home.not_edited,
            "failed": failed[0] if failed else None,
            "norm_deviation_percent": {way: _compute_deviation(rows, way) for way in WAYS},
            "rows": rows,
        }

    def format_lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        rows = [["way", "edits", *format_ratio_heads(result), *map(_shorten_name, SHARES)]]
        for way in WAYS:
            for row in _select_way(result["rows"], way):
                shares = [format_share(row[name]) for name in SHARES]
                rows.append([way, str(row["edits"]), *format_ratio_cells(row), *shares])
        yield from align_rows(rows)
        yield ""
        for way, change in result["norm_deviation_percent"].items():
            end, most = ("-" if n is None else f"{n:.2f} %" for n in change.values())
            yield f"{way}: norms in the end {end} from those after the first facts, at most {most}"
        if result["failed"]:
            yield f"stacked ended early: {result['failed']}"
        yield f"not edited {result['not_edited']}"

    def draw_curves(self, result: Mapping[str, Any], left: Any, right: Any) -> None:
        for n, way in enumerate(WAYS):
            rows = _select_way(result["rows"], way)
            edits = [row["edits"] for row in rows]
            plot_largest_norms(left, rows, f"C{n}", way)
            for name, style in (("reliability_strict", "-"), ("locality_strict", "--")):
                shares = [to_percent(row[name]) for row in rows]
                label = f"{way}, {_shorten_name(name)}"
                right.plot(edits, shares, style, marker=".", color=f"C{n}", label=label)
        right.set(xlabel="edits", ylabel="%", ylim=(-2, 102), title="Held")


def _run_rounds(
    given: StudyInput, home: MemitMass, rounds: int
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of both ways, and the reason if the stacked one ended early."""
    loaded, model = given.loaded_model, given.loaded_model.model
    others = OtherTargets(given.records, random.Random(given.seed))
    live = thin_records(given.records)
    before = read_base_answers(model, live, given.track)
    stream = PresetStream(PRESETS[STACKED_PRESET], loaded.site, loaded.statistics)
    rows, failed = list[dict[str, Any]](), list[str]()
    for number in given.track(range(rounds + 1), "rounds"):
        wanted = [others.draw_replacement(record) for record in live] if number else live
        for batch in split_batches(wanted, given.batch_size):
            home.edit(batch)
        held = set(home.live_model.list_weights_facts())
        live = [n if n.fact.id in held else o for n, o in zip(wanted, live, strict=True)]
        edits = {"edits": len(live) * (number + 1)}
        rows.append({"way": WAYS[0], **edits, **_measure_point(given, live, before)})
        if not failed:
            with catch_unsolved(failed):
                _stack_edits(given, stream, home, [r.fact for r in live if r.fact.id in held])
                rows.append({"way": WAYS[1], **edits, **_measure_point(given, live, before)})
        model.set_deltas(home.live_model.active_deltas)
    return rows, failed


def _stack_edits(
    given: StudyInput, stream: PresetStream, home: MemitMass, facts: Sequence[Fact]
) -> None:
    """Stack the home's terms of the facts on all earlier edits of the stream."""
    for start in range(0, len(facts), given.batch_size):
        batch = [load_terms(home.store, f.id) for f in facts[start : start + given.batch_size]]
        given.loaded_model.model.set_deltas(stream.add(batch))


def _measure_point(
    given: StudyInput, live: Sequence[BenchRecord], before: Sequence[BaseAnswers]
) -> dict[str, Any]:
    columns = measure_columns(given.loaded_model.model, live, before)
    return {
        **measure_figures(given.loaded_model),
        "reliability_strict": columns["reliability"]["strict"],
        "reliability_generation": columns["reliability"]["generation"],
        "locality_strict": columns["locality"]["strict"],
    }


def _select_way(rows: Sequence[Mapping[str, Any]], way: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["way"] == way]


def _compute_deviation(rows: Sequence[Mapping[str, Any]], way: str) -> dict[str, float | None]:
    """Compute the largest change of a norm since the first facts, in per cent; None without rounds.

    Other targets have other norms, so that the rounds differ.
    """
    first, *rest = [row["norm_ratio"] for row in _select_way(rows, way)] or [{}]
    changes = [100 * max(abs(norms[name] / first[name] - 1) for name in first) for norms in rest]
    return {"end": changes[-1] if changes else None, "most": max(changes, default=None)}


def _shorten_name(name: str) -> str:
    column, measure = name.split("_")
    return f"{column[:3]}. {measure}"
