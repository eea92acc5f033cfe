"""Exactness of superseding and reverting: a home that lost facts is as if it never had them.

Its weights are compared with those of a fresh home that gets only the surviving facts, in another
order and in other batches.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from kedit_daemon.bench.dataset import BenchRecord, split_batches
from kedit_daemon.bench.measure import read_base_answers
from kedit_daemon.bench.methods.daemon_tiers import MemitMass
from kedit_daemon.bench.plot import draw_columns
from kedit_daemon.bench.run import name_matrix
from kedit_daemon.bench.studies.shared import (
    ColumnMeans,
    OtherTargets,
    format_ratio_cells,
    format_ratio_heads,
    list_neighbours,
    make_no_facts_error,
    measure_columns,
    measure_figures,
    plot_norms,
    sample_evenly,
)
from kedit_daemon.bench.studies.study import Study, StudyInput
from kedit_daemon.bench.table import align_rows, format_columns, format_share
from kedit_daemon.editing.model_loading import LoadedModel
from memory.facts import ACTIVE_STATES, FactState
from memory.model.generate import generate_answers
from policies.probe import count_answer_tokens

SUPERSEDED_SHARE, REVERTED_SHARE = 0.3, 0.2  # shares of the facts
HOMES = ("first", "fresh")


@dataclass(frozen=True)
class _ChangePlan:
    """Facts that change after they were added, drawn in one random order."""

    replacements: dict[str, BenchRecord]  # by the id of the superseded fact
    reverted: list[BenchRecord]
    change_order: list[str]  # ids of the changing facts


class ExactnessStudy(Study):
    """Add, supersede, revert; then compare with a home that only ever had the survivors."""

    def run(self, given: StudyInput) -> dict[str, Any]:
        """Compare both homes, before and after the first one consolidates."""
        rng = random.Random(given.seed)
        plan = _plan_changes(given.records, rng)
        open_home = partial(given.open_method, MemitMass, has_policy=False)
        with open_home() as first, open_home() as fresh:
            rows = list(_run_first_home(given, first, plan))
            survivors = _collect_survivors(first, [*given.records, *plan.replacements.values()])
            counts = {
                "superseded": len(first.store.list_facts((FactState.SUPERSEDED,))),
                "reverted": len(first.store.list_facts((FactState.REVERTED,))),
                "surviving": len(survivors),
                "not_edited": first.not_edited,
            }
            _fill_fresh_home(given, fresh, rng.sample(survivors, len(survivors)))
            answers = _compare_answers(given, first, fresh, survivors, plan.reverted)
            states = {"before": compare_weights(given.loaded_model, first, fresh)}
            consolidated = first.flush.generations.consolidate(dry_run=False)
            states["after"] = compare_weights(given.loaded_model, first, fresh)
            return {
                **counts,
                **answers,
                "changed_by_consolidation": consolidated["changed"],
                "consolidation": states,
                "rows": rows,
            }

    def format_lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        rows = [["change", "live", *format_ratio_heads(result)]]
        rows += [[r["change"], str(r["live"]), *format_ratio_cells(r)] for r in result["rows"]]
        yield from align_rows(rows)
        yield ""
        yield from format_columns([{"method": home, **result[home]} for home in HOMES])
        yield ""
        for name, state in result["consolidation"].items():
            for matrix, ratios in state["difference"].items():
                shares = f"{ratios['of_change']:.3g} of ‖W*−W0‖, {ratios['of_weights']:.3g} of ‖W*‖"
                yield f"{name} consolidating, {matrix}: ‖W−W*‖ is {shares}"
            agree = "agree" if state["same_hash"] else "differ"
            yield f"{name} consolidating: the sha256 of the weights {agree}"
        yield (
            f"superseded {result['superseded']}, reverted {result['reverted']}, "
            f"surviving {result['surviving']}, not edited {result['not_edited']}"
        )
        as_base = {name: format_share(value) for name, value in result["as_base"].items()}
        yield (
            f"answers as the base: reverted facts {as_base['reverted']}, the same questions in the "
            f"fresh home {as_base['fresh']}, as many neighbours {as_base['control']}"
        )

    def draw_curves(self, result: Mapping[str, Any], left: Any, right: Any) -> None:
        plot_norms(left, range(len(result["rows"])), result["rows"])
        left.set(xlabel="changes of the weights", ylabel="‖W‖ / ‖W0‖", title="The first home")
        draw_columns(right, [{"method": home, **result[home]} for home in HOMES])


def _plan_changes(records: Sequence[BenchRecord], rng: random.Random) -> _ChangePlan:
    order = rng.sample(list(records), len(records))
    replaced = order[: round(SUPERSEDED_SHARE * len(order))]
    reverted = order[len(replaced) :][: round(REVERTED_SHARE * len(order))]
    others = OtherTargets(records, rng)
    replacements = {record.fact.id: others.draw_replacement(record) for record in replaced}
    changing = [record.fact.id for record in (*replaced, *reverted)]
    return _ChangePlan(replacements, reverted, rng.sample(changing, len(changing)))


def _run_first_home(
    given: StudyInput, home: MemitMass, plan: _ChangePlan
) -> Iterator[dict[str, Any]]:
    """Add all facts to the first home, then make the changes in their order, in batches."""

    def build_row(change: str) -> dict[str, Any]:
        return {
            "change": change,
            "live": len(home.live_model.list_weights_facts()),
            **measure_figures(given.loaded_model),
        }

    for batch in given.track(split_batches(given.records, given.batch_size), "adding"):
        home.edit(batch)
        yield build_row("add")
    starts = range(0, len(plan.change_order), given.batch_size)
    for start in given.track(starts, "superseding and reverting"):
        ids = plan.change_order[start : start + given.batch_size]
        if new := [plan.replacements[n].fact for n in ids if n in plan.replacements]:
            home.edit(new)
            yield build_row("supersede")
        reverted = {n for n in ids if n not in plan.replacements}
        if facts := [f for f in home.store.list_facts(ACTIVE_STATES) if f.id in reverted]:
            home.flush.generations.remove_facts(facts, FactState.REVERTED, "bench")
            yield build_row("revert")


def _collect_survivors(home: MemitMass, records: Sequence[BenchRecord]) -> list[BenchRecord]:
    """Collect the records of the facts in a home's weights."""
    live = set(home.live_model.list_weights_facts())
    survivors = [record for record in records if record.fact.id in live]
    if not survivors:
        raise make_no_facts_error("no fact is in the weights")
    return survivors


def _fill_fresh_home(given: StudyInput, home: MemitMass, records: Sequence[BenchRecord]) -> None:
    """Add the records to the fresh home, in batches that end elsewhere."""
    given.loaded_model.model.set_deltas({})
    for batch in given.track(split_batches(records, given.batch_size + 1), "the fresh home"):
        home.edit(batch)


def _compare_answers(
    given: StudyInput,
    first: MemitMass,
    fresh: MemitMass,
    survivors: Sequence[BenchRecord],
    reverted: Sequence[BenchRecord],
) -> dict[str, Any]:
    """Measure the columns of both homes, and the shares of questions answered as by the base."""
    model = given.loaded_model.model
    model.set_deltas({})
    before = read_base_answers(model, survivors, given.track)
    neighbours = sample_evenly(list_neighbours(survivors), len(reverted))
    prompts = [record.fact.question for record in reverted]
    prompts += [near.prompt for _, near in neighbours]
    limit = count_answer_tokens(model, [record.fact for record in (*survivors, *reverted)])
    base = generate_answers(model, prompts, limit)
    columns: dict[str, ColumnMeans] = {}
    answers: dict[str, list[str]] = {}
    for name, home in zip(HOMES, (first, fresh), strict=True):
        model.set_deltas(home.live_model.active_deltas)
        columns[name] = measure_columns(model, survivors, before)
        answers[name] = generate_answers(model, prompts, limit)
    count = len(reverted)
    as_base = {
        "reverted": _compute_agreement(answers["first"][:count], base[:count]),
        "fresh": _compute_agreement(answers["fresh"][:count], base[:count]),
        "control": _compute_agreement(answers["first"][count:], base[count:]),
    }
    return {**columns, "as_base": as_base}


def _compute_agreement(answers: Sequence[str], base: Sequence[str]) -> float | None:
    return sum(a == b for a, b in zip(answers, base, strict=True)) / len(base) if base else None


def compare_weights(loaded: LoadedModel, first: MemitMass, fresh: MemitMass) -> dict[str, Any]:
    """Compare ‖W − W*‖_F by matrix with two lengths. The first home's weights are left active."""
    star, fresh_hash = _copy_weights(loaded, fresh)
    weights, first_hash = _copy_weights(loaded, first)
    difference = {}
    for n in loaded.layers:
        base = loaded.model.base_weight(n).double().cpu()
        gap = (weights[n] - star[n]).norm()
        lengths = {"of_change": (star[n] - base).norm(), "of_weights": star[n].norm()}
        difference[name_matrix(n)] = {name: float(gap / size) for name, size in lengths.items()}
    hashes = {"same_hash": first_hash == fresh_hash, "first": first_hash, "fresh": fresh_hash}
    return {"difference": difference, **hashes}


def _copy_weights(loaded: LoadedModel, home: MemitMass) -> tuple[dict[int, Tensor], str]:
    """Activate a home's weights; return W (hidden, width) in float64 by layer, and the hash."""
    model = loaded.model
    model.set_deltas(home.live_model.active_deltas)
    copies = {n: model.weight(n).detach().double().cpu().clone() for n in loaded.layers}
    return copies, model.weights_hash(loaded.layers)
