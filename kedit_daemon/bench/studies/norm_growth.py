"""What a stream of edits does to the weights and to what goes through them: the phenomena of
Gupta et al. 2025 (arXiv 2502.19416), of methods without a memory and of the daemon beside them."""

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from kedit_daemon.bench.dataset import BenchRecord, split_batches
from kedit_daemon.bench.method import Method, MethodSetup
from kedit_daemon.bench.method_catalog import import_method
from kedit_daemon.bench.reference_wise import ReferenceWise
from kedit_daemon.bench.run import name_matrix
from kedit_daemon.bench.scoring import PromptAnswer, score_answers
from kedit_daemon.bench.studies.reading import ActivationReader
from kedit_daemon.bench.studies.shared import catch_unsolved, to_percent
from kedit_daemon.bench.studies.study import Study, StudyInput
from kedit_daemon.bench.table import align_rows, format_share
from kedit_daemon.bench.tiers import Wise
from memory.errors import NotFinite
from memory.facts import Fact
from memory.model.editable import EditableModel
from memory.model.spectra import (
    effective_rank,
    linear_cka,
    singular_values,
    stable_rank,
    subspace_shift,
    top_singular_directions,
)

CURVE_POINTS = 10  # of each curve, about
OLDEST_FACTS = 50  # facts
MAX_SINGLE_FACTS = (
    120  # facts of a way that takes each alone, through the whole model: seconds a fact
)
TOP_DIRECTIONS = 16  # that a matrix writes strongest
SIDE_MATRIX = "side memory"  # among the matrices
SHARES = ("oldest_strict", "newest_strict", "all_strict")


@dataclass(frozen=True)
class StreamedMethod:
    """A method of the bench, how it gets the stream, and what that is called."""

    method: str
    one_by_one: bool = False
    policy: bool = True


# Without the policy every fact goes into the weights at once, by the daemon's own joint solve: that
# is what the policy stands before. With it the side memory comes first, and the weights take what
# they bear.
WAYS = {
    "ft": StreamedMethod("ft", one_by_one=True),
    "lora": StreamedMethod("lora", one_by_one=True),
    "memit": StreamedMethod("memit"),
    "wise": StreamedMethod("reference-wise", one_by_one=True),
    "no policy": StreamedMethod("memit-mass", policy=False),
    "daemon": StreamedMethod("auto"),
}


class NormGrowthStudy(Study):
    """The same facts in the same order through each way; one whose numbers break ends there, and
    one that takes each fact alone after the first of them."""

    panels = 6

    def run(self, given: StudyInput) -> dict[str, Any]:
        """Every way's curve. Facts come in batches no larger than the curves' steps."""
        probe = _CurveProbe(given)
        size = min(given.batch_size, _compute_step(given.records))
        rows, ends = list[dict[str, Any]](), dict[str, dict[str, Any]]()
        for name, way in WAYS.items():
            failed = list[str]()
            end: dict[str, Any] = {**asdict(way), "not_edited": 0}
            records = given.records[: MAX_SINGLE_FACTS if way.one_by_one else None]
            each, step = 1 if way.one_by_one else size, _compute_step(records)
            with catch_unsolved(failed), _open_method(given, way) as method:
                track = given.track(split_batches(records, each), name)
                for edited in _edit_stepwise(track, method, step, len(records)):
                    end["not_edited"] = method.not_edited
                    point = probe.measure_point(method, edited, step)
                    rows.append({"way": name, "edits": edited, **point})
            ends[name] = {**end, "failed": failed[0] if failed else None}
        return {"batch_size": size, "ways": ends, "rows": rows}

    def format_lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        """Every way's curve, the matrices at its end, and how it ended."""
        heads = ["way", "edits", "largest ‖W‖", "beside", "least ‖y‖", "most ‖y‖", "‖h‖", "CKA"]
        rows = [[*heads, "perplexity", *(name.removesuffix("_strict") for name in SHARES)]]
        for row in result["rows"]:
            figures = [get_edited_figure(row, "norm_ratio"), get_side_figure(row, "norm_ratio")]
            figures += [min(row["written_ratio"]), max(row["written_ratio"])]
            figures += [row["stream_ratio"][-1], row["cka"][-1], row["perplexity_ratio"]]
            cells = [_format_cell(figure) for figure in figures]
            rows.append(
                [row["way"], str(row["edits"]), *cells, *(format_share(row[n]) for n in SHARES)]
            )
        yield from align_rows(rows)
        yield ""
        yield from align_rows(list(_format_final_rows(result)))
        yield ""
        yield "‖W‖, ‖y‖, ‖h‖ and perplexity are to the base's; ranks are of W − W0"
        yield "beside: the copy in a side memory that has gone farthest; W stays as it is"
        yield "‖y‖: what an MLP writes; ‖h‖: the stream into the last block; CKA: out of it"
        for name, end in result["ways"].items():
            policy = "" if end["policy"] else ", no policy"
            failed = f"; ended early: {end['failed']}" if end["failed"] else ""
            yield f"{name}: {end['method']}{policy}, not edited {end['not_edited']}{failed}"

    def draw_curves(self, result: Mapping[str, Any], *axes: Any) -> None:
        """Matrices, what goes through them, and what the model then says, against edits."""
        for n, name in enumerate(result["ways"]):
            rows = [row for row in result["rows"] if row["way"] == name]
            edits, color = [row["edits"] for row in rows], f"C{n}"
            for panel, kind in zip(axes, MATRIX_CURVES, strict=False):
                panel.plot(edits, [get_edited_figure(row, kind) for row in rows], ".-", color=color)
                panel.plot(edits, [get_side_figure(row, kind) for row in rows], ".--", color=color)
            for panel, figure in zip(axes[len(MATRIX_CURVES) :], CURVES.values(), strict=True):
                label = name if panel is axes[LEGEND_PANEL] else None
                panel.plot(edits, [figure(row) for row in rows], ".-", color=color, label=label)
        for panel, title in zip(axes, (*MATRIX_CURVES.values(), *CURVES), strict=True):
            panel.set(xlabel="edits", title=title)
        axes[LEGEND_PANEL].plot([], [], "k--", label="copy in a side memory")
        axes[0].set_yscale("log")
        axes[5].set_ylim(-2, 102)


@contextmanager
def _open_method(given: StudyInput, way: StreamedMethod) -> Iterator[Method]:
    """The way's method on the unedited model, in a temporary folder. A flush of the daemon takes
    as many facts as the study was told, however few come at once."""
    with tempfile.TemporaryDirectory(prefix="kedit-bench-") as folder:
        setup = MethodSetup(
            given.loaded_model, Path(folder), given.batch_size, given.seed, way.policy
        )
        method = import_method(way.method)(setup)
        try:
            yield method
        finally:
            method.close()
            given.loaded_model.model.set_deltas({})


def _compute_step(records: Sequence[BenchRecord]) -> int:
    """Edits between two points of a curve."""
    return -(-len(records) // CURVE_POINTS)


def _edit_stepwise(
    stream: Iterable[Sequence[Fact]], method: Method, step: int, whole: int
) -> Iterator[int]:
    """Batch after batch; how many facts have come at each point of the curve."""
    done = 0
    for batch in stream:
        before, done = done, done + len(batch)
        method.edit(batch)
        if done // step > before // step or done == whole:
            yield done


class _CurveProbe:
    """Takes the points of the curves, against the model as it was when this was made."""

    def __init__(self, given: StudyInput) -> None:
        self.model, self.site = given.loaded_model.model, given.loaded_model.site
        self.facts = [record.fact for record in given.records]
        self.reader = ActivationReader(self.model)
        self.base_reading = self.reader.read_activations(None)

    def measure_point(self, method: Method, edited: int, step: int) -> dict[str, Any]:
        """The row after so many facts, `step` more than at the last one. Raises KeditError (code
        "non-finite")."""
        changes = self._collect_changes(method)
        now = self.reader.read_activations(method.overlay)
        if not now.is_finite or not all(bool(d.isfinite().all()) for _, d in changes.values()):
            why = f"after {edited} edits a weight or an activation is NaN or infinite"
            raise NotFinite(why)
        held = self._check_held(method, edited)
        return {
            "matrices": {name: self._measure_spectrum(*change) for name, change in changes.items()},
            "written_ratio": _divide_pairwise(now.mlp_norms, self.base_reading.mlp_norms),
            "stream_ratio": _divide_pairwise(now.stream_norms, self.base_reading.stream_norms),
            "cka": [
                linear_cka(*ends)
                for ends in zip(self.base_reading.statement_ends, now.statement_ends, strict=True)
            ],
            "perplexity_ratio": now.perplexity / self.base_reading.perplexity,
            "oldest_strict": fmean(held[:OLDEST_FACTS]),
            "newest_strict": fmean(held[-step:]),
            "all_strict": fmean(held),
        }

    def _collect_changes(self, method: Method) -> dict[str, tuple[int, Tensor]]:
        """W − W0 (hidden, width) of every matrix that may be edited, by name, with its layer.

        A side memory leaves W alone and answers from copies of it: there it is the copy that has
        gone farthest, W0 and what the memory holds for it.
        """
        weight, base = self.model.weight, self.model.base_weight
        found = {name_matrix(n): (n, weight(n).detach() - base(n)) for n in self.site.layers}
        if copies := _collect_copies(method):
            farthest = max(copies, key=lambda delta: float(delta.norm()))
            found[SIDE_MATRIX] = (self.site.side_layer, farthest)
        return found

    def _measure_spectrum(self, layer: int, delta: Tensor) -> dict[str, float]:
        """Strength of W, and breadth and direction of its change."""
        base = self.model.base_weight(layer)
        now, spread = base + delta, singular_values(delta)
        (before, pointed), (after, points) = (
            top_singular_directions(m, TOP_DIRECTIONS) for m in (base, now)
        )
        return {
            "norm_ratio": float(now.norm() / base.norm()),
            "spectral_ratio": float(after[0] / before[0]),
            "stable_rank": stable_rank(spread),
            "effective_rank": effective_rank(spread),
            "subspace_shift": subspace_shift(pointed, points),
        }

    def _check_held(self, method: Method, edited: int) -> list[bool]:
        """Whether each fact so far is answered, strictly."""
        rows = [_encode_fact(self.model, fact) for fact in self.facts[:edited]]
        return [all(row.token_hits) for row in score_answers(self.model, rows, method.overlay)]


def _collect_copies(method: Method) -> list[Tensor]:
    """W' − W0 (hidden, width) of all that a side memory may answer with."""
    if isinstance(method, ReferenceWise):
        return [memory.delta for memory in method.answering_memories]
    if isinstance(method, Wise):
        deltas = [shard.delta for shard in method.live_model.side.shards.values()]
        return [delta.up @ delta.down for delta in deltas]
    return []


def _encode_fact(model: EditableModel, fact: Fact) -> PromptAnswer:
    ids = model.encode_target(fact.question, fact.target)
    return PromptAnswer(tuple(model.encode(fact.question)), tuple(ids))


def _divide_pairwise(now: Sequence[float], base: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(now, base, strict=True)]


def get_edited_figure(row: Mapping[str, Any], figure: str) -> float:
    """A row's largest of the edited weights."""
    return float(max(m[figure] for name, m in row["matrices"].items() if name != SIDE_MATRIX))


def get_side_figure(row: Mapping[str, Any], figure: str) -> float:
    """The same of the copy in a side memory; NaN where there is none."""
    return float(row["matrices"].get(SIDE_MATRIX, {}).get(figure, math.nan))


def _format_final_rows(result: Mapping[str, Any]) -> Iterator[list[str]]:
    """Rows about every matrix that is another than in the beginning."""
    yield ["at the end", "matrix", "‖W‖_F", "‖W‖_2", "stable rank", "effective rank", "shift"]
    last = {row["way"]: row for row in result["rows"]}
    for way, row in last.items():
        for name, matrix in row["matrices"].items():
            if matrix["effective_rank"]:
                yield [way, name, *map(_format_cell, matrix.values())]


def _format_cell(figure: float) -> str:
    return "-" if math.isnan(figure) else f"{figure:.4g}"


MATRIX_CURVES = {
    "norm_ratio": "Largest ‖W‖ / ‖W0‖",
    "subspace_shift": f"Largest shift of the {TOP_DIRECTIONS} strongest directions",
}
CURVES: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "‖y‖ of the last MLP / base's": lambda row: float(row["written_ratio"][-1]),
    "CKA with the base, last layer": lambda row: float(row["cka"][-1]),
    "Perplexity / base's": lambda row: float(row["perplexity_ratio"]),
    f"Oldest {OLDEST_FACTS} facts held, strict, %": lambda row: to_percent(row["oldest_strict"]),
}
LEGEND_PANEL = 4  # the panel that names the colours: curves rise there, and its corner is free
