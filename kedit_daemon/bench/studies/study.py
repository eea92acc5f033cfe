"""Interface of the studies, and the runner that adds the common keys to each one's JSON."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedit_daemon.bench.dataset import BenchRecord, FactStream
from kedit_daemon.bench.measure import ProgressTracker
from kedit_daemon.bench.methods.method import M, open_method
from kedit_daemon.bench.plot import open_figure
from kedit_daemon.bench.run import collect_provenance
from kedit_daemon.editing.model_loading import LoadedModel
from kedit_daemon.system.sanitize import clean_text


@dataclass(frozen=True)
class StudyInput:
    """Input of a study. texts_path: lines of ordinary text that replace the shipped ones. method:
    the only one to measure, of a study that measures several."""

    loaded_model: LoadedModel
    records: Sequence[BenchRecord]
    batch_size: int
    seed: int
    track: ProgressTracker
    texts_path: Path | None = None
    method: str | None = None

    def open_method(self, method: type[M], **options: Any) -> AbstractContextManager[M]:
        """Open a method in a temporary folder; `options` are further fields of MethodSetup."""
        return open_method(method, self.loaded_model, self.batch_size, self.seed, **options)


class Study:
    """Base of all studies. A study may edit the model: the caller restores the weights."""

    panels = 2  # of its plot

    def run(self, given: StudyInput) -> dict[str, Any]:
        """Measure, and return the JSON, with the points of the curve under `rows`."""
        raise NotImplementedError

    def format_lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        """Format the table, and the summary below it."""
        raise NotImplementedError

    def draw_curves(self, result: Mapping[str, Any], left: Any, right: Any) -> None:
        """Draw the curves on axes of matplotlib, one for each panel."""
        raise NotImplementedError


def run_study(
    name: str,
    study: Study,
    loaded: LoadedModel,
    stream: FactStream,
    batch_size: int,
    seed: int,
    track: ProgressTracker,
    texts: Path | None = None,
    method: str | None = None,
) -> dict[str, Any]:
    """Run a study, add its provenance, and restore the model's weights."""
    given = StudyInput(loaded, stream.records, batch_size, seed, track, texts, method)
    try:
        result = study.run(given)
    finally:
        loaded.model.set_deltas({})
    return {
        "study": name,
        **collect_provenance(loaded, seed),
        "facts": len(stream.records),
        "skipped": len(stream.skipped),
        "batch_size": batch_size,
        **result,
    }


def format_study(study: Study, result: Mapping[str, Any]) -> Iterator[str]:
    """Format the text output of a study."""
    batch = f"batches of {result['batch_size']}, seed {result['seed']}"
    facts = f"{result['facts']} facts, {result['skipped']} records skipped"
    yield f"{result['study']}: {facts}, {batch}, on {clean_text(result['model'])}"
    yield f"commit {result['commit']}, {result['device']}"
    yield ""
    yield from study.format_lines(result)


def draw_study(study: Study, result: Mapping[str, Any], path: Path) -> None:
    """Draw the study's curves as PNG."""
    with open_figure(path, study.panels) as panels:
        study.draw_curves(result, *panels)
        for axes in panels:
            if axes.get_legend_handles_labels()[0]:  # one panel may name the colours of all
                axes.legend(fontsize="small")
