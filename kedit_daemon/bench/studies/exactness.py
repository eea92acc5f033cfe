"""Whether a home that took facts, replaced some and gave some back is as if it never had them.

Its weights are set against those of a fresh home that is given only the facts that are left, in
another order and in other batches.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kedit_daemon.bench.dataset import BenchRecord, batches
from kedit_daemon.bench.measure import before_edits
from kedit_daemon.bench.plot import bars
from kedit_daemon.bench.run import matrix_name
from kedit_daemon.bench.studies.shared import (
    Columns,
    OtherTargets,
    asked,
    figures,
    home_for,
    neighbours_of,
    nothing_left,
    ratio_cells,
    ratio_heads,
    spread,
)
from kedit_daemon.bench.studies.study import Given, Study
from kedit_daemon.bench.table import aligned, column_lines, share
from kedit_daemon.bench.tiers import MemitMass
from kedit_daemon.editing.model_loading import Loaded
from memory.facts import ACTIVE, State
from memory.model.generate import answers
from policies.probe import longest_target

SUPERSEDED, REVERTED = 0.3, 0.2  # shares of the facts
HOMES = ("first", "fresh")


@dataclass(frozen=True)
class _Plan:
    """What happens to facts after they have come, in one random order."""

    new: dict[str, BenchRecord]  # by the id of the fact that is superseded
    out: list[BenchRecord]  # what is reverted
    order: list[str]  # ids of the facts that change, as they do


class Exactness(Study):
    """Add, supersede, revert; then compare with a home that only ever had what is left."""

    def run(self, given: Given) -> dict[str, Any]:
        """Both homes, before and after the first one consolidates."""
        chance = random.Random(given.seed)
        plan = _planned(given.records, chance)
        with home_for(given) as first, home_for(given) as fresh:
            rows = list(_lived(given, first, plan))
            kept = _kept(first, [*given.records, *plan.new.values()])
            counts = {
                "superseded": len(first.store.facts((State.SUPERSEDED,))),
                "reverted": len(first.store.facts((State.REVERTED,))),
                "surviving": len(kept),
                "not_edited": first.not_edited,
            }
            _born(given, fresh, chance.sample(kept, len(kept)))
            found = {**counts, **_answered(given, first, fresh, kept, plan.out)}
            states = {"before": difference(given.loaded, first, fresh)}
            consolidated = first.flush.weights.consolidate(dry_run=False)
            states["after"] = difference(given.loaded, first, fresh)
            return {
                **found,
                "changed_by_consolidation": consolidated["changed"],
                "consolidation": states,
                "rows": rows,
            }

    def lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        """The first home's way, the columns of both, and how far apart their weights are."""
        rows = [["change", "live", *ratio_heads(result)]]
        rows += [[r["change"], str(r["live"]), *ratio_cells(r)] for r in result["rows"]]
        yield from aligned(rows)
        yield ""
        yield from column_lines([{"method": home, **result[home]} for home in HOMES])
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
        as_base = {name: share(value) for name, value in result["as_base"].items()}
        yield (
            f"answers as the base: reverted facts {as_base['reverted']}, the same questions in the "
            f"fresh home {as_base['fresh']}, as many neighbours {as_base['control']}"
        )

    def draw(self, result: Mapping[str, Any], left: Any, right: Any) -> None:
        """The first home's norms on its way, and the columns of both homes."""
        for matrix in result["rows"][0]["norm_ratio"]:
            left.plot([r["norm_ratio"][matrix] for r in result["rows"]], marker=".", label=matrix)
        left.set(xlabel="changes of the weights", ylabel="‖W‖ / ‖W0‖", title="The first home")
        bars(right, [{"method": home, **result[home]} for home in HOMES])


def _planned(records: Sequence[BenchRecord], chance: random.Random) -> _Plan:
    """Which facts change, and how, from one random order."""
    order = chance.sample(list(records), len(records))
    replaced = order[: round(SUPERSEDED * len(order))]
    out = order[len(replaced) :][: round(REVERTED * len(order))]
    others = OtherTargets(records, chance)
    new = {record.fact.id: others.superseding(record) for record in replaced}
    changing = [record.fact.id for record in (*replaced, *out)]
    return _Plan(new, out, chance.sample(changing, len(changing)))


def _lived(given: Given, home: MemitMass, plan: _Plan) -> Iterator[dict[str, Any]]:
    """All facts into the first home, then the changes in their order, some at a time."""

    def row(change: str) -> dict[str, Any]:
        return {"change": change, "live": len(home.served.weights_facts()), **figures(given.loaded)}

    for batch in given.track(batches(given.records, given.batch_size), "adding"):
        home.edit(batch)
        yield row("add")
    starts = range(0, len(plan.order), given.batch_size)
    for start in given.track(starts, "superseding and reverting"):
        ids = plan.order[start : start + given.batch_size]
        if new := [plan.new[n].fact for n in ids if n in plan.new]:
            home.edit(new)
            yield row("supersede")
        leaving = {n for n in ids if n not in plan.new}
        if out := [f for f in home.store.facts(ACTIVE) if f.id in leaving]:
            home.flush.weights.take_out(out, State.REVERTED, "bench")
            yield row("revert")


def _kept(home: MemitMass, records: Sequence[BenchRecord]) -> list[BenchRecord]:
    """What lives in a home, as records."""
    live = set(home.served.weights_facts())
    kept = [record for record in records if record.fact.id in live]
    if not kept:
        raise nothing_left("no fact has come into the weights")
    return kept


def _born(given: Given, home: MemitMass, kept: Sequence[BenchRecord]) -> None:
    """The fresh home: what is left, in an order of its own and with other bounds of batches."""
    given.loaded.model.set_deltas({})
    for batch in given.track(batches(kept, given.batch_size + 1), "the fresh home"):
        home.edit(batch)


def _answered(
    given: Given,
    first: MemitMass,
    fresh: MemitMass,
    kept: Sequence[BenchRecord],
    out: Sequence[BenchRecord],
) -> dict[str, Any]:
    """The columns of both homes, and which questions are answered as the base does."""
    model = given.loaded.model
    model.set_deltas({})
    before = before_edits(model, kept, given.track)
    questions = [record.fact.question for record in out]
    control = [near.prompt for _, near in spread(neighbours_of(kept), len(out))]
    room = longest_target(model, [record.fact for record in (*kept, *out)])
    base = answers(model, [*questions, *control], room)
    found: dict[str, Columns] = {}
    said: dict[str, list[str]] = {}
    for name, home in zip(HOMES, (first, fresh), strict=True):
        model.set_deltas(home.served.deltas)
        found[name] = asked(model, kept, before)
        said[name] = answers(model, [*questions, *control], room)
    many = len(questions)
    as_base = {
        "reverted": _agreeing(said["first"][:many], base[:many]),
        "fresh": _agreeing(said["fresh"][:many], base[:many]),
        "control": _agreeing(said["first"][many:], base[many:]),
    }
    return {**found, "as_base": as_base}


def _agreeing(said: Sequence[str], base: Sequence[str]) -> float | None:
    return sum(a == b for a, b in zip(said, base, strict=True)) / len(base) if base else None


def difference(loaded: Loaded, first: MemitMass, fresh: MemitMass) -> dict[str, Any]:
    """‖W − W*‖_F by matrix against two lengths. The first home's weights are left active."""
    model = loaded.model
    model.set_deltas(fresh.served.deltas)
    star, wanted = _weights(loaded), model.weights_hash(loaded.layers)
    model.set_deltas(first.served.deltas)
    have, found = _weights(loaded), model.weights_hash(loaded.layers)
    far = {}
    for n in loaded.layers:
        base = model.base_weight(n).double().cpu()
        gap = (have[n] - star[n]).norm()
        of = {"of_change": (star[n] - base).norm(), "of_weights": star[n].norm()}
        far[matrix_name(n)] = {name: float(gap / length) for name, length in of.items()}
    return {"difference": far, "same_hash": found == wanted, "first": found, "fresh": wanted}


def _weights(loaded: Loaded) -> dict[int, Tensor]:
    """W (hidden, width) in float64 by layer."""
    return {n: loaded.model.weight(n).detach().double().cpu().clone() for n in loaded.layers}
