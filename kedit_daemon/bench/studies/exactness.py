"""Whether a home that took facts, replaced some and gave some back is as if it never had them.

Its weights are set against those of a fresh home that is given only the facts that are left, in
another order and in other batches.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kedit_daemon.bench.dataset import BenchRecord, split_batches
from kedit_daemon.bench.measure import read_base_answers
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
    open_home,
    sample_evenly,
)
from kedit_daemon.bench.studies.study import Study, StudyInput
from kedit_daemon.bench.table import align_rows, format_columns, format_share
from kedit_daemon.bench.tiers import MemitMass
from kedit_daemon.editing.model_loading import LoadedModel
from memory.facts import ACTIVE_STATES, FactState
from memory.model.generate import generate_answers
from policies.probe import count_answer_tokens

SUPERSEDED_SHARE, REVERTED_SHARE = 0.3, 0.2  # shares of the facts
HOMES = ("first", "fresh")


@dataclass(frozen=True)
class _ChangePlan:
    """What happens to facts after they have come, in one random order."""

    replacements: dict[str, BenchRecord]  # by the id of the fact that is superseded
    reverted: list[BenchRecord]  # what is reverted
    change_order: list[str]  # ids of the facts that change, as they do


class ExactnessStudy(Study):
    """Add, supersede, revert; then compare with a home that only ever had what is left."""

    def run(self, given: StudyInput) -> dict[str, Any]:
        """Both homes, before and after the first one consolidates."""
        chance = random.Random(given.seed)
        plan = _plan_changes(given.records, chance)
        with open_home(given) as first, open_home(given) as fresh:
            rows = list(_run_first_home(given, first, plan))
            kept = _collect_survivors(first, [*given.records, *plan.replacements.values()])
            counts = {
                "superseded": len(first.store.list_facts((FactState.SUPERSEDED,))),
                "reverted": len(first.store.list_facts((FactState.REVERTED,))),
                "surviving": len(kept),
                "not_edited": first.not_edited,
            }
            _fill_fresh_home(given, fresh, chance.sample(kept, len(kept)))
            found = {**counts, **_compare_answers(given, first, fresh, kept, plan.reverted)}
            states = {"before": compare_weights(given.loaded_model, first, fresh)}
            consolidated = first.flush.generations.consolidate(dry_run=False)
            states["after"] = compare_weights(given.loaded_model, first, fresh)
            return {
                **found,
                "changed_by_consolidation": consolidated["changed"],
                "consolidation": states,
                "rows": rows,
            }

    def format_lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        """The first home's way, the columns of both, and how far apart their weights are."""
        rows = [["change", "live", *format_ratio_heads(result)]]
        rows += [[r["change"], str(r["live"]), *format_ratio_cells(r)] for r in result["rows"]]
        yield from align_rows(rows)
        yield ""
        yield from format_columns([{"method": home, **result[home]} for home in HOMES])
        yield ""
        for name, state in result["consolidation"].items():
            for matrix, far in state["difference"].items():
                of = f"{far['of_change']:.3g} of ‖W*−W0‖, {far['of_weights']:.3g} of ‖W*‖"
                yield f"{name} consolidating, {matrix}: ‖W−W*‖ is {of}"
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
        """The first home's norms on its way, and the columns of both homes."""
        for matrix in result["rows"][0]["norm_ratio"]:
            left.plot([r["norm_ratio"][matrix] for r in result["rows"]], marker=".", label=matrix)
        left.set(xlabel="changes of the weights", ylabel="‖W‖ / ‖W0‖", title="The first home")
        draw_columns(right, [{"method": home, **result[home]} for home in HOMES])


def _plan_changes(records: Sequence[BenchRecord], chance: random.Random) -> _ChangePlan:
    """Which facts change, and how, from one random order."""
    order = chance.sample(list(records), len(records))
    replaced = order[: round(SUPERSEDED_SHARE * len(order))]
    out = order[len(replaced) :][: round(REVERTED_SHARE * len(order))]
    others = OtherTargets(records, chance)
    new = {record.fact.id: others.draw_replacement(record) for record in replaced}
    changing = [record.fact.id for record in (*replaced, *out)]
    return _ChangePlan(new, out, chance.sample(changing, len(changing)))


def _run_first_home(
    given: StudyInput, home: MemitMass, plan: _ChangePlan
) -> Iterator[dict[str, Any]]:
    """All facts into the first home, then the changes in their order, some at a time."""

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
        leaving = {n for n in ids if n not in plan.replacements}
        if out := [f for f in home.store.list_facts(ACTIVE_STATES) if f.id in leaving]:
            home.flush.generations.remove_facts(out, FactState.REVERTED, "bench")
            yield build_row("revert")


def _collect_survivors(home: MemitMass, records: Sequence[BenchRecord]) -> list[BenchRecord]:
    """What lives in a home, as records."""
    live = set(home.live_model.list_weights_facts())
    kept = [record for record in records if record.fact.id in live]
    if not kept:
        raise make_no_facts_error("no fact has come into the weights")
    return kept


def _fill_fresh_home(given: StudyInput, home: MemitMass, kept: Sequence[BenchRecord]) -> None:
    """The fresh home: what is left, in an order of its own and with other bounds of batches."""
    given.loaded_model.model.set_deltas({})
    for batch in given.track(split_batches(kept, given.batch_size + 1), "the fresh home"):
        home.edit(batch)


def _compare_answers(
    given: StudyInput,
    first: MemitMass,
    fresh: MemitMass,
    kept: Sequence[BenchRecord],
    out: Sequence[BenchRecord],
) -> dict[str, Any]:
    """The columns of both homes, and which questions are answered as the base does."""
    model = given.loaded_model.model
    model.set_deltas({})
    before = read_base_answers(model, kept, given.track)
    questions = [record.fact.question for record in out]
    control = [near.prompt for _, near in sample_evenly(list_neighbours(kept), len(out))]
    room = count_answer_tokens(model, [record.fact for record in (*kept, *out)])
    base = generate_answers(model, [*questions, *control], room)
    found: dict[str, ColumnMeans] = {}
    said: dict[str, list[str]] = {}
    for name, home in zip(HOMES, (first, fresh), strict=True):
        model.set_deltas(home.live_model.active_deltas)
        found[name] = measure_columns(model, kept, before)
        said[name] = generate_answers(model, [*questions, *control], room)
    many = len(questions)
    as_base = {
        "reverted": _compute_agreement(said["first"][:many], base[:many]),
        "fresh": _compute_agreement(said["fresh"][:many], base[:many]),
        "control": _compute_agreement(said["first"][many:], base[many:]),
    }
    return {**found, "as_base": as_base}


def _compute_agreement(said: Sequence[str], base: Sequence[str]) -> float | None:
    return sum(a == b for a, b in zip(said, base, strict=True)) / len(base) if base else None


def compare_weights(loaded: LoadedModel, first: MemitMass, fresh: MemitMass) -> dict[str, Any]:
    """‖W − W*‖_F by matrix against two lengths. The first home's weights are left active."""
    model = loaded.model
    model.set_deltas(fresh.live_model.active_deltas)
    star, wanted = _copy_weights(loaded), model.weights_hash(loaded.layers)
    model.set_deltas(first.live_model.active_deltas)
    have, found = _copy_weights(loaded), model.weights_hash(loaded.layers)
    far = {}
    for n in loaded.layers:
        base = model.base_weight(n).double().cpu()
        gap = (have[n] - star[n]).norm()
        of = {"of_change": (star[n] - base).norm(), "of_weights": star[n].norm()}
        far[name_matrix(n)] = {name: float(gap / length) for name, length in of.items()}
    return {"difference": far, "same_hash": found == wanted, "first": found, "fresh": wanted}


def _copy_weights(loaded: LoadedModel) -> dict[int, Tensor]:
    """W (hidden, width) in float64 by layer."""
    return {n: loaded.model.weight(n).detach().double().cpu().clone() for n in loaded.layers}
