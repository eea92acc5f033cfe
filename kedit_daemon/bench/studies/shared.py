"""What the studies share: terms for all facts, other targets, samples, and their scores."""

import math
import random
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from kedit_daemon.bench.dataset import BenchRecord
from kedit_daemon.bench.measure import BaseAnswers, MeasuredModel, average_columns, measure_records
from kedit_daemon.bench.method import MethodSetup
from kedit_daemon.bench.run import measure_health
from kedit_daemon.bench.studies.study import StudyInput
from kedit_daemon.bench.table import format_share
from kedit_daemon.bench.tiers import MemitMass
from kedit_daemon.editing.model_loading import LoadedModel
from memory.db.store import Store
from memory.errors import KeditError, Unsolvable
from memory.facts import Neighbour
from memory.model.editable import EditableModel
from policies.memit_mass import unpack_terms
from policies.probe import normalize_answer
from policies.targets import EditTerms, Refusal, compute_terms
from policies.edit_terms import EditTerms, Refusal, unpack_terms
from policies.probe import normalise_answer
from policies.targets import compute_terms

T = TypeVar("T")
MAX_NEIGHBOURS = 100  # at most so many are asked at each point of a curve
LINE_STRIDE = 7  # lines from where one text of ordinary lines begins to where the next does
SHOWN_MEASURES = ("strict", "generation")

ColumnMeans = dict[str, dict[str, float | None]]
"""Means by column and measure, as of `columns`."""


def compute_stream_terms(given: StudyInput) -> list[tuple[BenchRecord, EditTerms]]:
    """Every record of the stream with its terms; those whose fact is refused are left out."""
    facts = [record.fact for record in given.records]
    bar = iter(given.track(range(len(facts)), "targets"))

    def advance_bar(part: Mapping[str, EditTerms | Refusal]) -> None:
        for _ in part:
            next(bar, None)

    loaded = given.loaded_model
    norms = {n: layer.median_norm for n, layer in loaded.statistics.items()}
    found = compute_terms(loaded.model, loaded.site, norms, facts, advance_bar)
    next(bar, None)  # past the last one, where a bar ends
    pairs = [(record, found[record.fact.id]) for record in given.records]
    kept = [(record, terms) for record, terms in pairs if isinstance(terms, EditTerms)]
    if not kept:
        raise make_no_facts_error("no fact of the stream has targets that the model can reach")
    return kept


def load_terms(store: Store, fact_id: str) -> EditTerms:
    """A fact's terms as a home keeps them, which is without the way that led to them."""
    return EditTerms(
        *unpack_terms(store.artifacts.read_terms(fact_id)), loss=math.nan, steps=0, lengths={}
    )


@contextmanager
def open_home(given: StudyInput) -> Iterator[MemitMass]:
    """The daemon's parts on a home in a temporary folder, with the policy off."""
    with tempfile.TemporaryDirectory(prefix="kedit-bench-") as folder:
        setup = MethodSetup(
            given.loaded_model, Path(folder), given.batch_size, given.seed, has_policy=False
        )
        home = MemitMass(setup)
        try:
            yield home
        finally:
            home.close()


def make_no_facts_error(why: str) -> KeditError:
    """The error of a study that has nothing to work on."""
    return KeditError(why, code="no-facts", hint="give more records, or other ones")


class OtherTargets:
    """Draws another target for a fact: of a record with its prompt if there is one, else of any."""

    def __init__(self, records: Sequence[BenchRecord], chance: random.Random) -> None:
        self._random = chance
        self._all_targets = [(normalize_answer(r.fact.target), r.fact.target) for r in records]
        self._targets_by_prompt = defaultdict[str, list[tuple[str, str]]](list)
        for record, target in zip(records, self._all_targets, strict=True):
            self._targets_by_prompt[record.fact.prompt].append(target)

    def draw_replacement(self, record: BenchRecord) -> BenchRecord:
        """The record with another target. Raises KeditError where there is none."""
        now = normalize_answer(record.fact.target)
        for pool in (self._targets_by_prompt[record.fact.prompt], self._all_targets):
            if others := [target for plain, target in pool if plain != now]:
                return _replace_target(record, self._random.choice(others))
        raise make_no_facts_error("all records have one target, so none can take another's place")


def _replace_target(record: BenchRecord, target: str) -> BenchRecord:
    truth = record.true_target
    if truth is not None and normalize_answer(truth) == normalize_answer(target):
        truth = None
    return replace(record, fact=replace(record.fact, target=target), true_target=truth)


def sample_evenly(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly apart."""
    many = len(items)
    return list(items) if many <= most else [items[i * many // most] for i in range(most)]


def prepend_text(
    model: EditableModel, lines: Sequence[str], number: int, tokens: int, end: str
) -> str:
    """About so many tokens of ordinary text, other ones for each number, then the end."""
    at, text, ids = LINE_STRIDE * number, "", list[int]()
    while len(ids) < tokens:
        text, at = f"{text} {lines[at % len(lines)]}".strip(), at + 1
        ids = model.encode(text)
    return f"{model.decode(ids[: max(tokens, 0)])} {end}".strip()


def list_neighbours(records: Sequence[BenchRecord]) -> list[tuple[int, Neighbour]]:
    """All neighbours, each with the place of its record."""
    return [(place, near) for place, record in enumerate(records) for near in record.neighbours]


def thin_records(records: Sequence[BenchRecord]) -> list[BenchRecord]:
    """The records without paraphrases, and with NEIGHBOURS neighbours in all."""
    kept = defaultdict[int, list[Neighbour]](list)
    for place, near in sample_evenly(list_neighbours(records), MAX_NEIGHBOURS):
        kept[place].append(near)
    return [
        replace(record, paraphrases=(), neighbours=tuple(kept[place]))
        for place, record in enumerate(records)
    ]


def measure_columns(
    model: EditableModel, records: Sequence[BenchRecord], before: Sequence[BaseAnswers]
) -> ColumnMeans:
    """The columns over some records, on the weights as they are."""
    return average_columns(measure_records(MeasuredModel(model), records, before, _skip_tracking))


def _skip_tracking(items: Sequence[T], _what: str, /) -> Iterable[T]:
    return items


def measure_figures(loaded: LoadedModel) -> dict[str, Any]:
    """Norm ratio by matrix, and the canary's perplexity ratio, of the weights as they are."""
    health = measure_health(loaded)
    perplexity = health["perplexity"]
    return {
        "norm_ratio": health["norm_ratio"],
        "perplexity_ratio": perplexity["after"] / perplexity["before"],
    }


@contextmanager
def catch_unsolved(failed: list[str]) -> Iterator[None]:
    """A solve that fails within the block ends it, and `failed` gets why."""
    try:
        yield
    except Unsolvable as error:
        failed.append(str(error))


def format_ratio_heads(result: Mapping[str, Any]) -> list[str]:
    """Heads of the cells that `ratio_cells` gives."""
    return [*result["rows"][0]["norm_ratio"], "perplexity"]


def format_ratio_cells(row: Mapping[str, Any]) -> list[str]:
    """A row's norm ratios and its perplexity ratio."""
    return [f"{ratio:.5g}" for ratio in (*row["norm_ratio"].values(), row["perplexity_ratio"])]


def find_largest_norm(row: Mapping[str, Any]) -> float:
    """The norm ratio of the matrix that has moved most."""
    ratios: Mapping[str, float] = row["norm_ratio"]
    return max(ratios.values())


def to_percent(value: float | None) -> float:
    """A share in per cent, for a curve; NaN for what was not asked."""
    return math.nan if value is None else 100 * value


def format_column_cells(found: ColumnMeans) -> list[str]:
    """The strict and the generation measure of each column."""
    return [format_share(found[column][measure]) for column in found for measure in SHOWN_MEASURES]


def format_column_heads(names: Sequence[str]) -> list[str]:
    """Heads of the cells that `column_cells` gives."""
    return [f"{name[:3]}. {measure}" for name in names for measure in SHOWN_MEASURES]
