"""Growth of weight and activation norms over a stream of edits, after Gupta et al. 2025.

Their phenomena (arXiv 2502.19416), for methods without a memory and for the daemon.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from torch import Tensor

from kedit_daemon.bench.dataset import BenchRecord, split_batches
from kedit_daemon.bench.methods.daemon_tiers import Wise
from kedit_daemon.bench.methods.method import Method
from kedit_daemon.bench.methods.method_catalog import import_method
from kedit_daemon.bench.methods.reference_wise import ReferenceWise
from kedit_daemon.bench.plot import to_percent
from kedit_daemon.bench.run import name_matrix
from kedit_daemon.bench.scoring import check_stated
from kedit_daemon.bench.studies.activation_reader import ActivationReader
from kedit_daemon.bench.studies.shared import catch_unsolved
from kedit_daemon.bench.studies.study import Study, StudyInput
from kedit_daemon.bench.table import align_rows, format_share
from kedit_daemon.editing.model_loading import CanaryTexts
from memory.errors import NotFinite
from memory.facts import Fact
from memory.model.spectra import (
    effective_rank,
    linear_cka,
    singular_values,
    stable_rank,
    subspace_shift,
    top_singular_directions,
)

OLDEST_FACTS = 50
TOP_DIRECTIONS = 16  # strongest output directions of a matrix
SIDE_MATRIX = "side memory"  # its name among the matrices
SHARES = ("oldest_strict", "newest_strict", "all_strict")


@dataclass(frozen=True)
class StreamedMethod:
    """Method of the bench, and how it gets the stream."""

    method: str
    one_by_one: bool = False
    policy: bool = True


# Without the policy, every fact goes into the weights at once, by the daemon's own joint solve.
# With it, the side memory comes first, and the weights take facts up to their capacity.
WAYS = {
    "pretrain": StreamedMethod("pretrain", one_by_one=True),
    "ft-wide": StreamedMethod("ft-wide", one_by_one=True),
    "ft": StreamedMethod("ft", one_by_one=True),
    "lora": StreamedMethod("lora", one_by_one=True),
    "mend": StreamedMethod("mend", one_by_one=True),
    "rome": StreamedMethod("rome", one_by_one=True),
    "memit": StreamedMethod("memit"),
    "wise": StreamedMethod("reference-wise", one_by_one=True),
    "no policy": StreamedMethod("memit-mass", policy=False),
    "daemon": StreamedMethod("auto"),
}


@dataclass(frozen=True)
class NormGrowthStudy(Study):
    """The same facts in the same order through each way; one ends when its numbers break.

    max_single_facts: facts of a way that takes each alone, through the whole model: seconds a fact.
    """

    panels = 6
    ways: Mapping[str, StreamedMethod] = field(default_factory=lambda: WAYS)
    curve_points: int = 10  # of each curve, about
    max_single_facts: int = 120
    texts: CanaryTexts | None = None  # that the model reads; otherwise the shipped ones

    def run(self, given: StudyInput) -> dict[str, Any]:
        """Measure every way's curve, in batches no larger than the curves' steps."""
        probe = _CurveProbe(given, self.texts)
        size = min(given.batch_size, self._compute_step(given.records))
        rows, ends = list[dict[str, Any]](), dict[str, dict[str, Any]]()
        for name, way in self.ways.items():
            failed, method = list[str](), import_method(way.method)
            end: dict[str, Any] = {**asdict(way), "not_edited": 0}
            records = given.records[: self.max_single_facts if way.one_by_one else None]
            each, step = 1 if way.one_by_one else size, self._compute_step(records)
            # A flush takes up to the study's batch size, however few facts come at once.
            opened = given.open_method(method, has_policy=way.policy)
            with catch_unsolved(failed), opened as editor:
                track = given.track(split_batches(records, each), name)
                for edited in _edit_stepwise(track, editor, step, len(records)):
                    end["not_edited"] = editor.not_edited
                    point = probe.measure_point(editor, edited, step)
                    rows.append({"way": name, "edits": edited, **point})
            given.loaded_model.model.set_deltas({})
            ends[name] = {**end, "failed": failed[0] if failed else None}
        return {"batch_size": size, "ways": ends, "rows": rows}

    def _compute_step(self, records: Sequence[BenchRecord]) -> int:
        """Compute the number of edits between two points of a curve."""
        return -(-len(records) // self.curve_points)

    def format_lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        heads = ["way", "edits", "largest ‖W‖", "beside", "least ‖y‖", "most ‖y‖", "‖h‖", "CKA"]
        rows = [[*heads, "perplexity", *(name.removesuffix("_strict") for name in SHARES)]]
        for row in result["rows"]:
            figures = [get_edited_figure(row, "norm_ratio"), get_side_figure(row, "norm_ratio")]
            figures += [min(row["written_ratio"]), max(row["written_ratio"])]
            figures += [row["stream_ratio"][-1], row["cka"][-1], row["perplexity_ratio"]]
            cells = [*map(_format_cell, figures), *(format_share(row[name]) for name in SHARES)]
            rows.append([row["way"], str(row["edits"]), *cells])
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
        drawn = dict.fromkeys(row["way"] for row in result["rows"])
        for n, name in enumerate(drawn):
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


def _edit_stepwise(
    stream: Iterable[Sequence[Fact]], method: Method, step: int, whole: int
) -> Iterator[int]:
    """Edit batch after batch, and yield the number of facts so far at each curve point."""
    done = 0
    for batch in stream:
        before, done = done, done + len(batch)
        method.edit(batch)
        if done // step > before // step or done == whole:
            yield done


class _CurveProbe:
    """Measures the points of the curves against the model at construction."""

    def __init__(self, given: StudyInput, texts: CanaryTexts | None = None) -> None:
        self.model, self.site = given.loaded_model.model, given.loaded_model.site
        self.facts = [record.fact for record in given.records]
        self.reader = ActivationReader(self.model, texts)
        self.base_reading = self.reader.read_activations(None)

    def measure_point(self, method: Method, edited: int, step: int) -> dict[str, Any]:
        """Measure the row after `edited` facts, `step` more than at the last. Raise NotFinite."""
        changes = self._collect_changes(method)
        now = self.reader.read_activations(method.overlay)
        if not now.is_finite or not all(bool(d.isfinite().all()) for _, d in changes.values()):
            raise NotFinite(f"after {edited} edits a weight or an activation is NaN or infinite")
        held, base = self._check_held(method, edited), self.base_reading
        return {
            "matrices": {name: self._measure_spectrum(*change) for name, change in changes.items()},
            "written_ratio": _divide_pairwise(now.mlp_norms, base.mlp_norms),
            "stream_ratio": _divide_pairwise(now.stream_norms, base.stream_norms),
            "cka": list(map(linear_cka, base.statement_ends, now.statement_ends)),
            "perplexity_ratio": now.perplexity / base.perplexity,
            "oldest_strict": fmean(held[:OLDEST_FACTS]),
            "newest_strict": fmean(held[-step:]),
            "all_strict": fmean(held),
        }

    def _collect_changes(self, method: Method) -> dict[str, tuple[int, Tensor]]:
        """Collect W − W0 (hidden, width) of every editable matrix, by name, with its layer.

        A side memory leaves W alone and answers from copies of it: the farthest copy counts.
        """
        weight, base = self.model.weight, self.model.base_weight
        layers = sorted({*self.site.layers, *method.edited_layers})
        changes = {name_matrix(n): (n, weight(n).detach() - base(n)) for n in layers}
        if copies := _collect_copies(method):
            farthest = max(copies, key=lambda delta: float(delta.norm()))
            changes[SIDE_MATRIX] = (self.site.side_layer, farthest)
        return changes

    def _measure_spectrum(self, layer: int, delta: Tensor) -> dict[str, float]:
        """Measure the strength of W, and the breadth and direction of its change."""
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
        """Check for each fact so far that it is answered, strictly."""
        return check_stated(self.model, self.facts[:edited], method.overlay)


def _collect_copies(method: Method) -> list[Tensor]:
    """Collect W' − W0 (hidden, width) of all copies that a side memory may answer from."""
    if isinstance(method, ReferenceWise):
        return [memory.delta for memory in method.answering_memories]
    if isinstance(method, Wise):
        deltas = [shard.delta for shard in method.live_model.side.shards.values()]
        return [delta.up @ delta.down for delta in deltas]
    return []


def _divide_pairwise(now: Sequence[float], base: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(now, base, strict=True)]


def get_edited_figure(row: Mapping[str, Any], figure: str) -> float:
    """Return a row's largest figure of the edited weights."""
    return float(max(m[figure] for name, m in row["matrices"].items() if name != SIDE_MATRIX))


def get_side_figure(row: Mapping[str, Any], figure: str) -> float:
    """Return a row's figure of the copy in a side memory; NaN without one."""
    return float(row["matrices"].get(SIDE_MATRIX, {}).get(figure, math.nan))


def _format_final_rows(result: Mapping[str, Any]) -> Iterator[list[str]]:
    """Format a row for every matrix that has changed."""
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
LEGEND_PANEL = 4  # curves rise there, so that a corner is free for the names of the colours
