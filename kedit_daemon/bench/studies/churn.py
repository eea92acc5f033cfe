"""Whether facts that keep changing wear the weights out: replaced by a joint solve, or stacked."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kedit_daemon.bench.dataset import BenchRecord, split_batches
from kedit_daemon.bench.measure import BaseAnswers, read_base_answers
from kedit_daemon.bench.solver_presets import PRESETS, PresetStream
from kedit_daemon.bench.studies.shared import (
    OtherTargets,
    catch_unsolved,
    find_largest_norm,
    format_ratio_cells,
    format_ratio_heads,
    load_terms,
    measure_columns,
    measure_figures,
    open_home,
    thin_records,
    to_percent,
)
from kedit_daemon.bench.studies.study import Study, StudyInput
from kedit_daemon.bench.table import align_rows, format_share
from kedit_daemon.bench.tiers import MemitMass
from memory.facts import Fact

ROUNDS = 20  # times that every fact is superseded
STACKED_PRESET = "memit"  # the preset that the same terms go through
SHARES = ("reliability_strict", "reliability_generation", "locality_strict")
WAYS = ("replaced", "stacked")


class ChurnStudy(Study):
    """Every fact superseded again and again, through the daemon's flush and stacked beside it."""

    def run(self, given: StudyInput) -> dict[str, Any]:
        """Both ways, round by round."""
        with open_home(given) as home:
            rows, failed = _run_rounds(given, home)
        return {
            "not_edited": home.not_edited,
            "failed": failed[0] if failed else None,
            "norm_deviation_percent": {way: _compute_deviation(rows, way) for way in WAYS},
            "rows": rows,
        }

    def format_lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        """Each way's rounds, then how far its norms went from those of the first facts."""
        rows = [
            ["way", "edits", *format_ratio_heads(result), *(_shorten_name(name) for name in SHARES)]
        ]
        for way in WAYS:
            for row in _select_way(result["rows"], way):
                shares = [format_share(row[name]) for name in SHARES]
                rows.append([way, str(row["edits"]), *format_ratio_cells(row), *shares])
        yield from align_rows(rows)
        yield ""
        for way, found in result["norm_deviation_percent"].items():
            end, most = ("-" if n is None else f"{n:.2f} %" for n in (found["end"], found["most"]))
            yield f"{way}: norms in the end {end} from those after the first facts, at most {most}"
        if result["failed"]:
            yield f"stacked ended early: {result['failed']}"
        yield f"not edited {result['not_edited']}"

    def draw_curves(self, result: Mapping[str, Any], left: Any, right: Any) -> None:
        """Norms, and what holds, against edits."""
        for n, way in enumerate(WAYS):
            rows = _select_way(result["rows"], way)
            edits = [row["edits"] for row in rows]
            left.plot(
                edits, [find_largest_norm(r) for r in rows], marker=".", color=f"C{n}", label=way
            )
            for name, style in (("reliability_strict", "-"), ("locality_strict", "--")):
                shares = [to_percent(row[name]) for row in rows]
                label = f"{way}, {_shorten_name(name)}"
                right.plot(edits, shares, style, marker=".", color=f"C{n}", label=label)
        left.set(xlabel="edits", ylabel="largest ‖W‖ / ‖W0‖", title="Norms", yscale="log")
        right.set(xlabel="edits", ylabel="%", ylim=(-2, 102), title="Held")


def _run_rounds(given: StudyInput, home: MemitMass) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of both ways, and why the stacked one ended early, if it did."""
    loaded, model = given.loaded_model, given.loaded_model.model
    others = OtherTargets(given.records, random.Random(given.seed))
    live = thin_records(given.records)
    before = read_base_answers(model, live, given.track)
    stream = PresetStream(PRESETS[STACKED_PRESET], loaded.site, loaded.statistics)
    rows, failed = list[dict[str, Any]](), list[str]()
    for number in given.track(range(ROUNDS + 1), "rounds"):
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
    """The terms that the home has for the facts, on top of all that the stream had before."""
    for start in range(0, len(facts), given.batch_size):
        batch = [load_terms(home.store, f.id) for f in facts[start : start + given.batch_size]]
        given.loaded_model.model.set_deltas(stream.add(batch))


def _measure_point(
    given: StudyInput, live: Sequence[BenchRecord], before: Sequence[BaseAnswers]
) -> dict[str, Any]:
    found = measure_columns(given.loaded_model.model, live, before)
    return {
        **measure_figures(given.loaded_model),
        "reliability_strict": found["reliability"]["strict"],
        "reliability_generation": found["reliability"]["generation"],
        "locality_strict": found["locality"]["strict"],
    }


def _select_way(rows: Sequence[Mapping[str, Any]], way: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["way"] == way]


def _compute_deviation(rows: Sequence[Mapping[str, Any]], way: str) -> dict[str, float | None]:
    """The largest change of a norm since the first facts, in per cent, after the last round and
    after any; None without a round. Other targets have other norms, so that the rounds differ."""
    first, *rest = [row["norm_ratio"] for row in _select_way(rows, way)] or [{}]
    away = [100 * max(abs(norms[name] / first[name] - 1) for name in first) for norms in rest]
    return {"end": away[-1] if away else None, "most": max(away, default=None)}


def _shorten_name(name: str) -> str:
    column, measure = name.split("_")
    return f"{column[:3]}. {measure}"
