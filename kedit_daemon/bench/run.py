"""One run: the facts through a method, then all of them measured; what comes out is the JSON."""

import math
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

from kedit_daemon.bench.dataset import Stream, batches
from kedit_daemon.bench.measure import (
    Before,
    Subject,
    Track,
    before_edits,
    columns,
    measure,
    retention,
)
from kedit_daemon.bench.method import Method, Setup
from kedit_daemon.bench.method_catalog import method_class
from kedit_daemon.bench.work import Progress, method_folder, result_in, write_result
from kedit_daemon.editing.model_loading import Loaded
from kedit_daemon.home import NAME


@dataclass(frozen=True)
class Plan:
    """What is asked for, apart from the facts. `work`: where a run that is resumed has its work."""

    method: str
    batch_size: int
    seed: int
    baseline: str | None = None
    policy: bool = True
    work: Path | None = None


def run(loaded: Loaded, stream: Stream, plan: Plan, track: Track) -> dict[str, Any]:
    """The result of the plan's method, with the baseline's under `baseline` if there is one.

    The model is left as it came.
    """
    if plan.baseline is not None:
        _can_begin(loaded, plan.baseline, plan)
    before = before_edits(loaded.model, stream.records, track)
    result = measured(loaded, stream, before, plan.method, plan, track)
    if plan.baseline is not None:
        result["baseline"] = measured(loaded, stream, before, plan.baseline, plan, track)
    return result


def _can_begin(loaded: Loaded, name: str, plan: Plan) -> None:
    """What a baseline refuses, it refuses before the method's long run."""
    with tempfile.TemporaryDirectory(prefix="kedit-bench-") as folder:
        method_class(name)(Setup(loaded, Path(folder), plan.batch_size, plan.seed)).close()


def measured(
    loaded: Loaded, stream: Stream, before: Sequence[Before], name: str, plan: Plan, track: Track
) -> dict[str, Any]:
    """The result of one method from the unedited model on, without a baseline."""
    with method_folder(plan.work, name, plan.batch_size) as folder:
        if (known := result_in(folder)) is not None:
            return known
        setup = Setup(loaded, folder, plan.batch_size, plan.seed, plan.policy)
        try:
            method = method_class(name)(setup)
            try:
                size = 1 if method.one_by_one else plan.batch_size
                seconds = _edit(method, stream, size, name, folder, track)
                subject = Subject(loaded.model, method.overlay, method.framed)
                scores = measure(subject, stream.records, before, track)
                result = {
                    **columns(scores),
                    "retention": retention(scores),
                    **health_of(loaded),
                    "seconds_per_fact": _seconds(method, seconds),
                    "peak_memory_bytes": peak_memory(),
                    "bytes_per_fact": method.stored_bytes() / len(stream.records),
                    **made_with(loaded, plan.seed),
                    "method": name,
                    "batch_size": size,
                    "policy": plan.policy,
                    "facts": len(stream.records),
                    "skipped": len(stream.skipped),
                    "not_edited": method.not_edited,
                }
                write_result(folder, result)
                return result
            finally:
                method.close()
        finally:
            loaded.model.set_deltas({})


def _edit(
    method: Method, stream: Stream, size: int, name: str, folder: Path, track: Track
) -> list[float]:
    """Seconds for each fact: its batch's, in equal shares. What a run that was cut off has done
    is not done again, where the method keeps it."""
    progress = Progress.read(folder) if method.keeps else Progress()
    method.watch.parts, method.not_edited = progress.parts, progress.not_edited
    every = batches(stream.records, size)
    for batch in track(every[len(progress.seconds) :], f"editing ({name})"):
        began = time.perf_counter()
        try:
            method.edit(batch)
        except BaseException:  # a Ctrl-C, too
            progress.begun += time.perf_counter() - began
            progress.write(folder)
            raise
        progress.seconds.append(progress.begun + time.perf_counter() - began)
        progress.begun, progress.not_edited = 0.0, method.not_edited
        progress.write(folder)
    shares = zip(every, progress.seconds, strict=True)
    return [spent / len(batch) for batch, spent in shares for _ in batch]


def made_with(loaded: Loaded, seed: int) -> dict[str, Any]:
    """What the figures were made with: the model, its site, the seed, the code, the device."""
    return {
        "model": loaded.name,
        "site": asdict(loaded.site),
        "seed": seed,
        "commit": commit(Path(__file__).parents[2]),
        "device": str(loaded.model.device),
    }


def matrix_name(layer: int | str) -> str:
    """What an edited matrix is called in the JSON."""
    return f"layer.{layer}.down_proj"


def health_of(loaded: Loaded) -> dict[str, Any]:
    """Perplexity before all edits and now, and ‖W‖_F / ‖W0‖_F by matrix."""
    health = loaded.canary.measure()
    ratios = {matrix_name(n): ratio for n, ratio in health.norm_ratio.items()}
    perplexity = {"before": loaded.canary.baseline.perplexity, "after": health.perplexity}
    return {"perplexity": perplexity, "norm_ratio": ratios}


def _seconds(method: Method, seconds: Sequence[float]) -> dict[str, Any]:
    ordered = sorted(seconds)
    parts = {name: spent / len(seconds) for name, spent in method.watch.parts.items()}
    p95 = ordered[math.ceil(0.95 * len(ordered)) - 1]
    return {"median": median(ordered), "mean": fmean(ordered), "p95": p95, "parts": parts}


def peak_memory() -> int:
    """The most memory that this process has held so far."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def commit(checkout: Path) -> str:
    """The checkout that runs, as git describes it; of an installed package the version."""
    try:
        top = _git(checkout, "rev-parse", "--show-toplevel")
        if Path(top).resolve() == checkout.resolve():
            return _git(checkout, "describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.CalledProcessError):
        pass  # no git, or no checkout
    return version(NAME)


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
