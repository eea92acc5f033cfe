"""Sweep of one method over batch sizes on the same facts, to fit costs and choose a size."""

from dataclasses import asdict, replace
from typing import Any

from kedit_daemon.bench.batch_size import BatchQuality, choose_size
from kedit_daemon.bench.dataset import FactStream, split_batches
from kedit_daemon.bench.measure import ProgressTracker, read_base_answers
from kedit_daemon.bench.methods.method_catalog import import_method
from kedit_daemon.bench.run import RunPlan, measure_method
from kedit_daemon.editing.model_loading import LoadedModel
from memory.errors import KeditError
from policies.cost_curve import fit_curve

BATCH_SIZES = (1, 5, 10, 25, 50, 100, 200)


def sweep_sizes(
    loaded: LoadedModel, stream: FactStream, plan: RunPlan, track: ProgressTracker
) -> dict[str, Any]:
    """Measure the plan's method from scratch at each size up to the number of facts (`sweep`).

    Adds the fitted `curve` of a fact's seconds, and the `chosen` size. Raises KeditError for a
    method that takes single facts. The model's weights are restored at the end.
    """
    if import_method(plan.method).needs_single_facts:
        why = f"{plan.method} takes single facts, whatever the batch size"
        raise KeditError(why, code="unsupported", hint="choose another --method")
    facts = len(stream.records)
    before = read_base_answers(loaded.model, stream.records, track)
    rows = [
        measure_method(loaded, stream, before, plan.method, replace(plan, batch_size=size), track)
        for size in BATCH_SIZES
        if size <= facts
    ]
    # The last batch may be smaller, so the fit uses the mean size of a row's batches.
    counts = [len(split_batches(stream.records, row["batch_size"])) for row in rows]
    means = [float(row["seconds_per_fact"]["mean"]) for row in rows]
    curve = fit_curve([(facts / n, mean) for n, mean in zip(counts, means, strict=True)])
    return {
        "method": plan.method,
        "facts": facts,
        "sweep": rows,
        "curve": asdict(curve),
        "chosen": choose_size(curve, [_build_quality(row) for row in rows]),
    }


def _build_quality(row: dict[str, Any]) -> BatchQuality:
    return BatchQuality(row["batch_size"], row["reliability"]["strict"], row["locality"]["strict"])
