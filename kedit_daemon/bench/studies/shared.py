"""Helpers of several studies: terms of the stream, other targets, samples, columns and norms."""

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from kedit_daemon.bench.dataset import BenchRecord
from kedit_daemon.bench.measure import BaseAnswers, MeasuredModel, average_columns, measure_records
from kedit_daemon.bench.run import measure_health
from kedit_daemon.bench.studies.study import StudyInput
from kedit_daemon.bench.table import SHOWN_MEASURES, format_share
from kedit_daemon.editing.model_loading import LoadedModel
from memory.db.store import Store
from memory.errors import KeditError, Unsolvable
from memory.facts import Neighbour
from memory.model.editable import EditableModel
from memory.model.generate import Overlay
from policies.edit_terms import EditTerms, Refusal, unpack_terms
from policies.probe import normalize_answer
from policies.targets import compute_terms

T = TypeVar("T")
MAX_NEIGHBOURS = 100  # asked at each point of a curve
LINE_STRIDE = 7  # lines between the starts of two texts of ordinary lines

ColumnMeans = dict[str, dict[str, float | None]]
"""Means by column and measure, as from `average_columns`."""


def compute_stream_terms(given: StudyInput) -> list[tuple[BenchRecord, EditTerms]]:
    """Compute the terms of the stream's records, and leave out those whose fact is refused."""
    facts = [record.fact for record in given.records]
    bar = iter(given.track(range(len(facts)), "targets"))

    def advance_bar(part: Mapping[str, EditTerms | Refusal]) -> None:
        for _ in part:
            next(bar, None)

    loaded = given.loaded_model
    norms = {n: layer.median_norm for n, layer in loaded.statistics.items()}
    terms_by_id = compute_terms(loaded.model, loaded.site, norms, facts, advance_bar)
    next(bar, None)  # past the last one, to end the bar
    pairs = [(record, terms_by_id[record.fact.id]) for record in given.records]
    solvable = [(record, terms) for record, terms in pairs if isinstance(terms, EditTerms)]
    if not solvable:
        raise make_no_facts_error("no fact of the stream has targets that the model can reach")
    return solvable


def load_terms(store: Store, fact_id: str) -> EditTerms:
    """Load a fact's terms from a home, which keeps no loss, steps and lengths."""
    keys_and_residuals = unpack_terms(store.artifacts.read_terms(fact_id))
    return EditTerms(*keys_and_residuals, loss=math.nan, steps=0, lengths={})


def make_no_facts_error(why: str) -> KeditError:
    """Make the error of a study that has nothing to work on."""
    return KeditError(why, code="no-facts", hint="give more records, or other ones")


class OtherTargets:
    """Draws another target for a fact: from a record with the same prompt, or else from any."""

    def __init__(self, records: Sequence[BenchRecord], rng: random.Random) -> None:
        self._rng = rng
        self._all_targets = [(normalize_answer(r.fact.target), r.fact.target) for r in records]
        self._targets_by_prompt = defaultdict[str, list[tuple[str, str]]](list)
        for record, target in zip(records, self._all_targets, strict=True):
            self._targets_by_prompt[record.fact.prompt].append(target)

    def draw_replacement(self, record: BenchRecord) -> BenchRecord:
        """Return the record with another target. Raise KeditError if there is none."""
        current = normalize_answer(record.fact.target)
        for pool in (self._targets_by_prompt[record.fact.prompt], self._all_targets):
            if others := [target for plain, target in pool if plain != current]:
                return _replace_target(record, self._rng.choice(others))
        raise make_no_facts_error("all records have the same target, so none can be replaced")


def _replace_target(record: BenchRecord, target: str) -> BenchRecord:
    truth = record.true_target
    if truth is not None and normalize_answer(truth) == normalize_answer(target):
        truth = None
    return replace(record, fact=replace(record.fact, target=target), true_target=truth)


def sample_evenly(items: Sequence[T], limit: int) -> list[T]:
    """Sample at most `limit` items at even distances."""
    count = len(items)
    return list(items) if count <= limit else [items[i * count // limit] for i in range(limit)]


def prepend_text(
    model: EditableModel, lines: Sequence[str], number: int, tokens: int, end: str
) -> str:
    """Put about `tokens` tokens of ordinary text, which vary with `number`, before the end."""
    line, text, ids = LINE_STRIDE * number, "", list[int]()
    while len(ids) < tokens:
        text, line = f"{text} {lines[line % len(lines)]}".strip(), line + 1
        ids = model.encode(text)
    return f"{model.decode(ids[: max(tokens, 0)])} {end}".strip()


def list_neighbours(records: Sequence[BenchRecord]) -> list[tuple[int, Neighbour]]:
    """List all neighbours, each with the index of its record."""
    return [(place, near) for place, record in enumerate(records) for near in record.neighbours]


def thin_records(records: Sequence[BenchRecord]) -> list[BenchRecord]:
    """Return the records without paraphrases, and with MAX_NEIGHBOURS neighbours in all."""
    sampled = defaultdict[int, list[Neighbour]](list)
    for place, near in sample_evenly(list_neighbours(records), MAX_NEIGHBOURS):
        sampled[place].append(near)
    return [
        replace(record, paraphrases=(), neighbours=tuple(sampled[place]))
        for place, record in enumerate(records)
    ]


def measure_columns(
    model: EditableModel,
    records: Sequence[BenchRecord],
    before: Sequence[BaseAnswers],
    overlay: Overlay | None = None,
) -> ColumnMeans:
    """Measure the columns over some records, on the current weights, with an overlay or without."""
    subject = MeasuredModel(model, overlay)
    return average_columns(measure_records(subject, records, before, _skip_tracking))


def _skip_tracking(items: Sequence[T], _what: str, /) -> Iterable[T]:
    return items


def measure_figures(loaded: LoadedModel) -> dict[str, Any]:
    """Measure the current weights: norm ratio by matrix, and the canary's perplexity ratio."""
    health = measure_health(loaded)
    ratio = health["perplexity"]["after"] / health["perplexity"]["before"]
    return {"norm_ratio": health["norm_ratio"], "perplexity_ratio": ratio}


@contextmanager
def catch_unsolved(failed: list[str]) -> Iterator[None]:
    """Append the reason to `failed` if a solve in the block fails, or an editor cannot edit this
    model, which ends the block."""
    try:
        yield
    except KeditError as error:
        if not isinstance(error, Unsolvable) and error.code != "unsupported":
            raise
        failed.append(str(error))


def format_ratio_heads(result: Mapping[str, Any]) -> list[str]:
    """Format the heads of `format_ratio_cells`."""
    return [*result["rows"][0]["norm_ratio"], "perplexity"]


def format_ratio_cells(row: Mapping[str, Any]) -> list[str]:
    """Format a row's norm ratios and its perplexity ratio."""
    return [f"{ratio:.5g}" for ratio in (*row["norm_ratio"].values(), row["perplexity_ratio"])]


def plot_largest_norms(
    axes: Any, rows: Sequence[Mapping[str, Any]], color: str, label: str
) -> None:
    """Draw each row's largest norm ratio against its edits, on a log scale."""
    norms = [max(row["norm_ratio"].values()) for row in rows]
    axes.plot([row["edits"] for row in rows], norms, marker=".", color=color, label=label)
    axes.set(xlabel="edits", ylabel="largest ‖W‖ / ‖W0‖", title="Norms", yscale="log")


def plot_norms(axes: Any, across: Sequence[float], rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the norm ratio of each matrix, row by row."""
    for matrix in rows[0]["norm_ratio"]:
        axes.plot(across, [row["norm_ratio"][matrix] for row in rows], marker=".", label=matrix)


def format_column_cells(means: ColumnMeans) -> list[str]:
    """Format the strict and the generation measure of each column."""
    return [format_share(means[column][measure]) for column in means for measure in SHOWN_MEASURES]


def format_column_heads(names: Sequence[str]) -> list[str]:
    """Format the heads of `format_column_cells`."""
    return [f"{name[:3]}. {measure}" for name in names for measure in SHOWN_MEASURES]
