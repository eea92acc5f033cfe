"""What every study is, and what stands in the JSON of each."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kedit_daemon.bench.dataset import BenchRecord, FactStream
from kedit_daemon.bench.measure import ProgressTracker
from kedit_daemon.bench.plot import open_figure
from kedit_daemon.bench.run import collect_provenance
from kedit_daemon.editing.model_loading import LoadedModel
from kedit_daemon.system.sanitize import clean_text


@dataclass(frozen=True)
class StudyInput:
    """What a study works on: the unedited model, the stream, and how many facts come at once.

    `texts` has lines of ordinary text in the place of the shipped ones.
    """

    loaded_model: LoadedModel
    records: Sequence[BenchRecord]
    batch_size: int
    seed: int
    track: ProgressTracker
    texts_path: Path | None = None


class Study:
    """One question. It may edit the model as it likes: the caller puts the weights back."""

    panels = 2  # of its picture

    def run(self, given: StudyInput) -> dict[str, Any]:
        """What was found, with the points of its curve under `rows`."""
        raise NotImplementedError

    def format_lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        """The table, and what follows from it."""
        raise NotImplementedError

    def draw_curves(self, result: Mapping[str, Any], left: Any, right: Any) -> None:
        """The curve, on axes of matplotlib: two, or as many as the study has panels."""
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
) -> dict[str, Any]:
    """The result of a study, and what it was made with. The model is left as it came."""
    given = StudyInput(loaded, stream.records, batch_size, seed, track, texts)
    try:
        found = study.run(given)
    finally:
        loaded.model.set_deltas({})
    return {
        "study": name,
        **collect_provenance(loaded, seed),
        "facts": len(stream.records),
        "skipped": len(stream.skipped),
        "batch_size": batch_size,
        **found,
    }


def format_study(study: Study, result: Mapping[str, Any]) -> Iterator[str]:
    """All lines that people see of a study."""
    batch = f"batches of {result['batch_size']}, seed {result['seed']}"
    facts = f"{result['facts']} facts, {result['skipped']} records skipped"
    yield f"{result['study']}: {facts}, {batch}, on {clean_text(result['model'])}"
    yield f"commit {result['commit']}, {result['device']}"
    yield ""
    yield from study.format_lines(result)


def draw_study(study: Study, result: Mapping[str, Any], path: Path) -> None:
    """Write the study's curve as PNG."""
    with open_figure(path, study.panels) as panels:
        study.draw_curves(result, *panels)
        for axes in panels:
            if axes.get_legend_handles_labels()[0]:  # colours may be named on one for all
                axes.legend(fontsize="small")
