"""One run: edit all facts by a method, then measure all of them, with the result as JSON."""

import math
import resource
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

from kedit_daemon.bench.dataset import FactStream, split_batches
from kedit_daemon.bench.measure import (
    BaseAnswers,
    MeasuredModel,
    ProgressTracker,
    average_columns,
    compute_retention,
    measure_records,
    read_base_answers,
)
from kedit_daemon.bench.methods.method import Method, MethodSetup, open_method
from kedit_daemon.bench.methods.method_catalog import import_method
from kedit_daemon.bench.resume import RunProgress, load_result, open_method_folder, save_result
from kedit_daemon.editing.model_loading import LoadedModel
from kedit_daemon.home import PROGRAM_NAME


@dataclass(frozen=True)
class RunPlan:
    """Options of a run. work_folder: keeps the progress of a run that may be resumed."""

    method: str
    batch_size: int
    seed: int
    baseline: str | None = None
    has_policy: bool = True
    work_folder: Path | None = None


def run_plan(
    loaded: LoadedModel, stream: FactStream, plan: RunPlan, track: ProgressTracker
) -> dict[str, Any]:
    """Measure the plan's method, and its baseline, if any, under `baseline`.

    The model's weights are restored at the end.
    """
    if plan.baseline is not None:  # what it refuses, it refuses before the method's long run
        with open_method(import_method(plan.baseline), loaded, plan.batch_size, plan.seed):
            pass
    before = read_base_answers(loaded.model, stream.records, track)
    result = measure_method(loaded, stream, before, plan.method, plan, track)
    if plan.baseline is not None:
        result["baseline"] = measure_method(loaded, stream, before, plan.baseline, plan, track)
    return result


def measure_method(
    loaded: LoadedModel,
    stream: FactStream,
    before: Sequence[BaseAnswers],
    name: str,
    plan: RunPlan,
    track: ProgressTracker,
) -> dict[str, Any]:
    """Measure one method, starting from the unedited model, without a baseline."""
    with open_method_folder(plan.work_folder, name, plan.batch_size) as folder:
        if (known := load_result(folder)) is not None:
            return known
        setup = MethodSetup(loaded, folder, plan.batch_size, plan.seed, plan.has_policy)
        try:
            with closing(import_method(name)(setup)) as method:
                size = 1 if method.needs_single_facts else plan.batch_size
                seconds = _edit_stream(method, stream, size, name, folder, track)
                subject = MeasuredModel(loaded.model, method.overlay, method.frame_prompt)
                scores = measure_records(subject, stream.records, before, track)
                result = {
                    **average_columns(scores),
                    "retention": compute_retention(scores),
                    **measure_health(loaded, method.edited_layers),
                    "seconds_per_fact": _summarize_seconds(method, seconds),
                    "peak_memory_bytes": read_peak_memory(),
                    "bytes_per_fact": method.count_stored_bytes() / len(stream.records),
                    **collect_provenance(loaded, plan.seed),
                    "method": name,
                    "batch_size": size,
                    "policy": plan.has_policy,
                    "facts": len(stream.records),
                    "skipped": len(stream.skipped),
                    "not_edited": method.not_edited,
                }
            save_result(folder, result)
            return result
        finally:
            loaded.model.set_deltas({})


def _edit_stream(
    method: Method, stream: FactStream, size: int, name: str, folder: Path, track: ProgressTracker
) -> list[float]:
    """Edit the stream, and return each fact's seconds: an equal share of its batch's.

    A resumable method continues where an interrupted run stopped.
    """
    progress = RunProgress.load(folder) if method.is_resumable else RunProgress()
    method.stopwatch.seconds_by_part, method.not_edited = progress.parts, progress.not_edited
    batches = split_batches(stream.records, size)
    for batch in track(batches[len(progress.seconds) :], f"editing ({name})"):
        began = time.perf_counter()
        try:
            method.edit(batch)
        except BaseException:  # also Ctrl-C
            progress.begun += time.perf_counter() - began
            progress.save(folder)
            raise
        progress.seconds.append(progress.begun + time.perf_counter() - began)
        progress.begun, progress.not_edited = 0.0, method.not_edited
        progress.save(folder)
    pairs = zip(batches, progress.seconds, strict=True)
    return [seconds / len(batch) for batch, seconds in pairs for _ in batch]


def collect_provenance(loaded: LoadedModel, seed: int) -> dict[str, Any]:
    """Describe the origin of figures: the model, its edit site, the seed, the code, the device."""
    return {
        "model": loaded.name,
        "site": asdict(loaded.site),
        "seed": seed,
        "commit": describe_commit(Path(__file__).parents[2]),
        "device": str(loaded.model.device),
    }


def name_matrix(layer: int | str) -> str:
    """Name an edited matrix as in the JSON."""
    return f"layer.{layer}.down_proj"


def measure_health(loaded: LoadedModel, layers: Collection[int] | None = None) -> dict[str, Any]:
    """Measure perplexity before all edits and now, and ‖W‖_F / ‖W0‖_F by matrix. `layers`: those
    that are edited, if not the site's."""
    health = loaded.canary.measure_health(layers)
    ratios = {name_matrix(n): ratio for n, ratio in health.norm_ratio.items()}
    perplexity = {"before": loaded.canary.base_readings.perplexity, "after": health.perplexity}
    return {"perplexity": perplexity, "norm_ratio": ratios}


def _summarize_seconds(method: Method, seconds: Sequence[float]) -> dict[str, Any]:
    ordered = sorted(seconds)
    by_part = method.stopwatch.seconds_by_part
    parts = {name: spent / len(seconds) for name, spent in by_part.items()}
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return {"median": median(ordered), "mean": fmean(ordered), "p95": p95, "parts": parts}


def read_peak_memory() -> int:
    """Return the peak memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def describe_commit(checkout: Path) -> str:
    """Describe the running checkout by git, or an installed package by its version."""
    try:
        top = _run_git(checkout, "rev-parse", "--show-toplevel")
        if Path(top).resolve() == checkout.resolve():
            return _run_git(checkout, "describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        pass  # no git, or not a checkout
    return version(PROGRAM_NAME)


def _run_git(folder: Path, *words: str) -> str:
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
