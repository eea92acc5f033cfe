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

from kedit_daemon.bench.dataset import BenchRecord, batches
from kedit_daemon.bench.method import Method, Setup
from kedit_daemon.bench.method_catalog import method_class
from kedit_daemon.bench.reference_wise import ReferenceWise
from kedit_daemon.bench.run import matrix_name
from kedit_daemon.bench.scoring import Wanted, forced
from kedit_daemon.bench.studies.reading import Reader
from kedit_daemon.bench.studies.shared import cent, unsolved
from kedit_daemon.bench.studies.study import Given, Study
from kedit_daemon.bench.table import aligned, share
from kedit_daemon.bench.tiers import Wise
from memory.errors import KeditError
from memory.facts import Fact
from memory.model.editable import EditableModel
from memory.model.spectra import (
    effective_rank,
    linear_cka,
    singular_values,
    stable_rank,
    strongest,
    subspace_shift,
)

POINTS = 10  # of each curve, about
OLDEST = 50  # facts
ONE_BY_ONE = 120  # facts of a way that takes each alone, through the whole model: seconds a fact
DIRECTIONS = 16  # that a matrix writes strongest
SIDE = "side memory"  # among the matrices
SHARES = ("oldest_strict", "newest_strict", "all_strict")


@dataclass(frozen=True)
class Way:
    """A method of the bench, how it gets the stream, and what that is called."""

    method: str
    one_by_one: bool = False
    policy: bool = True


# Without the policy every fact goes into the weights at once, by the daemon's own joint solve: that
# is what the policy stands before. With it the side memory comes first, and the weights take what
# they bear.
WAYS = {
    "ft": Way("ft", one_by_one=True),
    "lora": Way("lora", one_by_one=True),
    "memit": Way("memit"),
    "wise": Way("reference-wise", one_by_one=True),
    "no policy": Way("memit-mass", policy=False),
    "daemon": Way("auto"),
}


class Norms(Study):
    """The same facts in the same order through each way; one whose numbers break ends there, and
    one that takes each fact alone after the first of them."""

    panels = 6

    def run(self, given: Given) -> dict[str, Any]:
        """Every way's curve. Facts come in batches no larger than the curves' steps."""
        probe = _Probe(given)
        size = min(given.batch_size, _step(given.records))
        rows, ends = list[dict[str, Any]](), dict[str, dict[str, Any]]()
        for name, way in WAYS.items():
            failed = list[str]()
            end: dict[str, Any] = {**asdict(way), "not_edited": 0}
            records = given.records[: ONE_BY_ONE if way.one_by_one else None]
            each, step = 1 if way.one_by_one else size, _step(records)
            with unsolved(failed), _method(given, way) as method:
                track = given.track(batches(records, each), name)
                for edited in _edited(track, method, step, len(records)):
                    end["not_edited"] = method.not_edited
                    point = probe.point(method, edited, step)
                    rows.append({"way": name, "edits": edited, **point})
            ends[name] = {**end, "failed": failed[0] if failed else None}
        return {"batch_size": size, "ways": ends, "rows": rows}

    def lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        """Every way's curve, the matrices at its end, and how it ended."""
        heads = ["way", "edits", "largest ‖W‖", "beside", "least ‖y‖", "most ‖y‖", "‖h‖", "CKA"]
        rows = [[*heads, "perplexity", *(name.removesuffix("_strict") for name in SHARES)]]
        for row in result["rows"]:
            figures = [grown(row, "norm_ratio"), beside(row, "norm_ratio")]
            figures += [min(row["written_ratio"]), max(row["written_ratio"])]
            figures += [row["stream_ratio"][-1], row["cka"][-1], row["perplexity_ratio"]]
            cells = [_cell(figure) for figure in figures]
            rows.append([row["way"], str(row["edits"]), *cells, *(share(row[n]) for n in SHARES)])
        yield from aligned(rows)
        yield ""
        yield from aligned(list(_at_the_end(result)))
        yield ""
        yield "‖W‖, ‖y‖, ‖h‖ and perplexity are to the base's; ranks are of W − W0"
        yield "beside: the copy in a side memory that has gone farthest; W stays as it is"
        yield "‖y‖: what an MLP writes; ‖h‖: the stream into the last block; CKA: out of it"
        for name, end in result["ways"].items():
            policy = "" if end["policy"] else ", no policy"
            failed = f"; ended early: {end['failed']}" if end["failed"] else ""
            yield f"{name}: {end['method']}{policy}, not edited {end['not_edited']}{failed}"

    def draw(self, result: Mapping[str, Any], *axes: Any) -> None:
        """Matrices, what goes through them, and what the model then says, against edits."""
        for n, name in enumerate(result["ways"]):
            rows = [row for row in result["rows"] if row["way"] == name]
            edits, color = [row["edits"] for row in rows], f"C{n}"
            for panel, kind in zip(axes, MATRIX_CURVES, strict=False):
                panel.plot(edits, [grown(row, kind) for row in rows], ".-", color=color)
                panel.plot(edits, [beside(row, kind) for row in rows], ".--", color=color)
            for panel, figure in zip(axes[len(MATRIX_CURVES) :], CURVES.values(), strict=True):
                label = name if panel is axes[NAMED] else None
                panel.plot(edits, [figure(row) for row in rows], ".-", color=color, label=label)
        for panel, title in zip(axes, (*MATRIX_CURVES.values(), *CURVES), strict=True):
            panel.set(xlabel="edits", title=title)
        axes[NAMED].plot([], [], "k--", label="copy in a side memory")
        axes[0].set_yscale("log")
        axes[5].set_ylim(-2, 102)


@contextmanager
def _method(given: Given, way: Way) -> Iterator[Method]:
    """The way's method on the unedited model, in a temporary folder. A flush of the daemon takes
    as many facts as the study was told, however few come at once."""
    with tempfile.TemporaryDirectory(prefix="kedit-bench-") as folder:
        setup = Setup(given.loaded, Path(folder), given.batch_size, given.seed, way.policy)
        method = method_class(way.method)(setup)
        try:
            yield method
        finally:
            method.close()
            given.loaded.model.set_deltas({})


def _step(records: Sequence[BenchRecord]) -> int:
    """Edits between two points of a curve."""
    return -(-len(records) // POINTS)


def _edited(
    stream: Iterable[Sequence[Fact]], method: Method, step: int, whole: int
) -> Iterator[int]:
    """Batch after batch; how many facts have come at each point of the curve."""
    done = 0
    for batch in stream:
        before, done = done, done + len(batch)
        method.edit(batch)
        if done // step > before // step or done == whole:
            yield done


class _Probe:
    """Takes the points of the curves, against the model as it was when this was made."""

    def __init__(self, given: Given) -> None:
        self.model, self.site = given.loaded.model, given.loaded.site
        self.facts = [record.fact for record in given.records]
        self.reader = Reader(self.model)
        self.base = self.reader.read(None)

    def point(self, method: Method, edited: int, step: int) -> dict[str, Any]:
        """The row after so many facts, `step` more than at the last one. Raises KeditError (code
        "non-finite")."""
        changes = self._changes(method)
        now = self.reader.read(method.overlay)
        if not now.finite or not all(bool(d.isfinite().all()) for _, d in changes.values()):
            why = f"after {edited} edits a weight or an activation is NaN or infinite"
            raise KeditError(why, code="non-finite")
        held = self._held(method, edited)
        return {
            "matrices": {name: self._spectrum(*change) for name, change in changes.items()},
            "written_ratio": _ratios(now.written, self.base.written),
            "stream_ratio": _ratios(now.stream, self.base.stream),
            "cka": [linear_cka(*ends) for ends in zip(self.base.ends, now.ends, strict=True)],
            "perplexity_ratio": now.perplexity / self.base.perplexity,
            "oldest_strict": fmean(held[:OLDEST]),
            "newest_strict": fmean(held[-step:]),
            "all_strict": fmean(held),
        }

    def _changes(self, method: Method) -> dict[str, tuple[int, Tensor]]:
        """W − W0 (hidden, width) of every matrix that may be edited, by name, with its layer.

        A side memory leaves W alone and answers from copies of it: there it is the copy that has
        gone farthest, W0 and what the memory holds for it.
        """
        weight, base = self.model.weight, self.model.base_weight
        found = {matrix_name(n): (n, weight(n).detach() - base(n)) for n in self.site.layers}
        if copies := _copies(method):
            farthest = max(copies, key=lambda delta: float(delta.norm()))
            found[SIDE] = (self.site.side_layer, farthest)
        return found

    def _spectrum(self, layer: int, delta: Tensor) -> dict[str, float]:
        """Strength of W, and breadth and direction of its change."""
        base = self.model.base_weight(layer)
        now, spread = base + delta, singular_values(delta)
        (before, pointed), (after, points) = (strongest(m, DIRECTIONS) for m in (base, now))
        return {
            "norm_ratio": float(now.norm() / base.norm()),
            "spectral_ratio": float(after[0] / before[0]),
            "stable_rank": stable_rank(spread),
            "effective_rank": effective_rank(spread),
            "subspace_shift": subspace_shift(pointed, points),
        }

    def _held(self, method: Method, edited: int) -> list[bool]:
        """Whether each fact so far is answered, strictly."""
        rows = [_wanted(self.model, fact) for fact in self.facts[:edited]]
        return [all(row.right) for row in forced(self.model, rows, method.overlay)]


def _copies(method: Method) -> list[Tensor]:
    """W' − W0 (hidden, width) of all that a side memory may answer with."""
    if isinstance(method, ReferenceWise):
        return [memory.delta for memory in method.memories]
    if isinstance(method, Wise):
        deltas = [shard.delta for shard in method.served.side.shards.values()]
        return [delta.up @ delta.down for delta in deltas]
    return []


def _wanted(model: EditableModel, fact: Fact) -> Wanted:
    ids = model.encode_target(fact.question, fact.target)
    return Wanted(tuple(model.encode(fact.question)), tuple(ids))


def _ratios(now: Sequence[float], base: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(now, base, strict=True)]


def grown(row: Mapping[str, Any], figure: str) -> float:
    """A row's largest of the edited weights."""
    return float(max(m[figure] for name, m in row["matrices"].items() if name != SIDE))


def beside(row: Mapping[str, Any], figure: str) -> float:
    """The same of the copy in a side memory; NaN where there is none."""
    return float(row["matrices"].get(SIDE, {}).get(figure, math.nan))


def _at_the_end(result: Mapping[str, Any]) -> Iterator[list[str]]:
    """Rows about every matrix that is another than in the beginning."""
    yield ["at the end", "matrix", "‖W‖_F", "‖W‖_2", "stable rank", "effective rank", "shift"]
    last = {row["way"]: row for row in result["rows"]}
    for way, row in last.items():
        for name, matrix in row["matrices"].items():
            if matrix["effective_rank"]:
                yield [way, name, *map(_cell, matrix.values())]


def _cell(figure: float) -> str:
    return "-" if math.isnan(figure) else f"{figure:.4g}"


MATRIX_CURVES = {
    "norm_ratio": "Largest ‖W‖ / ‖W0‖",
    "subspace_shift": f"Largest shift of the {DIRECTIONS} strongest directions",
}
CURVES: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "‖y‖ of the last MLP / base's": lambda row: float(row["written_ratio"][-1]),
    "CKA with the base, last layer": lambda row: float(row["cka"][-1]),
    "Perplexity / base's": lambda row: float(row["perplexity_ratio"]),
    f"Oldest {OLDEST} facts held, strict, %": lambda row: cent(row["oldest_strict"]),
}
NAMED = 4  # the panel that names the colours: curves rise there, and its corner is free
