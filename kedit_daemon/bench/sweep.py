"""One method in batches of several sizes, on the same facts: what a batch costs, and the choice."""

from dataclasses import asdict, replace
from typing import Any

from kedit_daemon.bench.dataset import Stream, batches
from kedit_daemon.bench.measure import Track, before_edits
from kedit_daemon.bench.method_catalog import method_class
from kedit_daemon.bench.run import Plan, measured
from kedit_daemon.editing.model_loading import Loaded
from memory.errors import KeditError
from policies.batching import Quality, choose, fit

SIZES = (1, 5, 10, 25, 50, 100, 200)


def sweep_sizes(loaded: Loaded, stream: Stream, plan: Plan, track: Track) -> dict[str, Any]:
    """The result of the plan's method at each size up to the number of facts, each from scratch
    (`sweep`), the fitted `curve` of a fact's seconds, and the `chosen` size.

    Raises KeditError for a method that takes single facts. The model is left as it came.
    """
    if method_class(plan.method).one_by_one:
        raise KeditError(
            f"{plan.method} takes single facts, whatever the batch size",
            code="unsupported",
            hint="choose another --method",
        )
    facts = len(stream.records)
    before = before_edits(loaded.model, stream.records, track)
    rows = [
        measured(loaded, stream, before, plan.method, replace(plan, batch_size=size), track)
        for size in SIZES
        if size <= facts
    ]
    # The last batch may be a smaller one, so a size counts as what its batches have on average.
    curve = fit(
        [(facts / len(batches(stream.records, row["batch_size"])), _seconds(row)) for row in rows]
    )
    return {
        "method": plan.method,
        "facts": facts,
        "sweep": rows,
        "curve": asdict(curve),
        "chosen": choose(curve, [_quality(row) for row in rows]),
    }


def _seconds(row: dict[str, Any]) -> float:
    return float(row["seconds_per_fact"]["mean"])


def _quality(row: dict[str, Any]) -> Quality:
    return Quality(row["batch_size"], row["reliability"]["strict"], row["locality"]["strict"])
