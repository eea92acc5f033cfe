"""The published methods beside the daemon's, on the same terms in the same batches."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from kedit_daemon.bench.dataset import BenchRecord
from kedit_daemon.bench.measure import COLUMNS, Before, before_edits
from kedit_daemon.bench.solver_presets import PRESETS, Stream
from kedit_daemon.bench.studies.shared import (
    asked,
    cent,
    column_cells,
    column_heads,
    figures,
    largest_norm,
    ratio_cells,
    ratio_heads,
    terms_of,
    thinned,
    unsolved,
)
from kedit_daemon.bench.studies.study import Given, Study
from kedit_daemon.bench.table import aligned, share
from policies.targets import Terms

POINTS = 10  # of each preset's curve, about
COHORT = 100  # facts: the oldest, and the newest
SHARES = ("oldest_strict", "newest_strict", "locality_strict")
STYLES = dict(zip(SHARES, ("-", ":", "--"), strict=True))


class Presets(Study):
    """One stream through each preset; a preset whose solve fails ends there."""

    def run(self, given: Given) -> dict[str, Any]:
        """Every preset's curve, and its columns at the end."""
        pairs = terms_of(given)
        records = [record for record, _ in pairs]
        model = given.loaded.model
        before = before_edits(model, records, given.track)
        near = [record for record in thinned(records) if record.neighbours]
        near_before = before_edits(model, near, given.track)
        rows, ends = list[dict[str, Any]](), dict[str, dict[str, Any]]()
        for name in PRESETS:
            failed = list[str]()
            with unsolved(failed):
                for edited in _edited(given, name, [terms for _, terms in pairs]):
                    point = _point(given, records[:edited], near, near_before)
                    rows.append({"preset": name, "edits": edited, **point})
            found = None if failed else asked(model, records, before)
            ends[name] = {"columns": found, "failed": failed[0] if failed else None}
        return {"not_edited": len(given.records) - len(pairs), "presets": ends, "rows": rows}

    def lines(self, result: Mapping[str, Any]) -> Iterator[str]:
        """Every preset's curve, then the columns at the end of the stream."""
        rows = [["preset", "edits", *ratio_heads(result), *(_short(name) for name in SHARES)]]
        for row in result["rows"]:
            shares = [share(row[name]) for name in SHARES]
            rows.append([row["preset"], str(row["edits"]), *ratio_cells(row), *shares])
        yield from aligned(rows)
        yield ""
        ends = [["at the end", *column_heads(COLUMNS)]]
        for name, end in result["presets"].items():
            if end["columns"] is not None:
                ends.append([name, *column_cells(end["columns"])])
        yield from aligned(ends)
        yield ""
        for name, end in result["presets"].items():
            if end["failed"]:
                yield f"{name} ended early: {end['failed']}"
        yield f"not edited {result['not_edited']}"

    def draw(self, result: Mapping[str, Any], left: Any, right: Any) -> None:
        """Norms, and what holds, against edits."""
        for n, name in enumerate(result["presets"]):
            rows = [row for row in result["rows"] if row["preset"] == name]
            edits, color = [row["edits"] for row in rows], f"C{n}"
            left.plot(edits, [largest_norm(r) for r in rows], marker=".", color=color, label=name)
            for measure, style in STYLES.items():
                shares = [cent(row[measure]) for row in rows]
                label = _short(measure) if n == 0 else None  # the colours are named on the left
                right.plot(edits, shares, style, marker=".", color=color, label=label)
        left.set(xlabel="edits", ylabel="largest ‖W‖ / ‖W0‖", title="Norms", yscale="log")
        right.set(xlabel="edits", ylabel="%", ylim=(-2, 102), title="Held, strict")


def _edited(given: Given, name: str, terms: Sequence[Terms]) -> Iterator[int]:
    """Batch after batch into the weights; how many facts are in at each point of the curve."""
    loaded, size = given.loaded, given.batch_size
    stream = Stream(PRESETS[name], loaded.site, loaded.statistics)
    starts = range(0, len(terms), size)
    every = -(-len(starts) // POINTS)
    for number, start in enumerate(given.track(starts, name), 1):
        loaded.model.set_deltas(stream.add(terms[start : start + size]))
        if number % every == 0 or number == len(starts):
            yield min(start + size, len(terms))


def _point(
    given: Given,
    edited: Sequence[BenchRecord],
    near: Sequence[BenchRecord],
    before: Sequence[Before],
) -> dict[str, Any]:
    return {
        **figures(given.loaded),
        "oldest_strict": _held(given, edited[:COHORT]),
        "newest_strict": _held(given, edited[-COHORT:]),
        "locality_strict": asked(given.loaded.model, near, before)["locality"]["strict"],
    }


def _held(given: Given, records: Sequence[BenchRecord]) -> float | None:
    """Reliability, strict, of some facts."""
    bare = [replace(record, paraphrases=(), neighbours=()) for record in records]
    before = [Before((), ())] * len(bare)
    return asked(given.loaded.model, bare, before)["reliability"]["strict"]


def _short(name: str) -> str:
    return name.removesuffix("_strict")
