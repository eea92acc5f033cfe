from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from kedit_daemon.bench.batch_size import BatchQuality, choose_size
from kedit_daemon.bench.dataset import BenchRecord, FactStream
from kedit_daemon.bench.run import RunPlan, run_plan
from kedit_daemon.bench.sweep import sweep_sizes
from kedit_daemon.editing.model_loading import LoadedModel
from memory.errors import KeditError
from memory.facts import Fact
from policies.cost_curve import fit_curve


def straight(items: Sequence[Any], _what: str, /) -> Iterable[Any]:
    return items


@pytest.fixture
def loaded(load: Callable[[str], LoadedModel]) -> LoadedModel:
    return load("llama")


def stream(facts: int) -> FactStream:
    cities = ("Oslo", "Lima", "Cairo", "Quito", "Paris")
    records = (Fact(f"country {n}", "The seat of {} is", cities[n % 5]) for n in range(facts))
    return FactStream(tuple(BenchRecord(fact, "Rome", (), ()) for fact in records), ())


def test_each_size_is_a_run_from_scratch(loaded: LoadedModel) -> None:
    base = loaded.model.weights_hash(range(loaded.model.layer_count))
    result = sweep_sizes(loaded, stream(10), RunPlan("ft", 99, 0), straight)
    assert loaded.model.weights_hash(range(loaded.model.layer_count)) == base
    assert [row["batch_size"] for row in result["sweep"]] == [1, 5, 10]
    for row in result["sweep"][1:]:
        alone = run_plan(loaded, stream(10), RunPlan("ft", row["batch_size"], 0), straight)
        assert set(row) == set(alone)
        for key in ("reliability", "locality", "norm_ratio", "perplexity"):
            assert row[key] == alone[key]


def test_curve_and_choice_follow_from_the_rows(loaded: LoadedModel) -> None:
    result = sweep_sizes(loaded, stream(6), RunPlan("memit-mass", 1, 0, has_policy=False), straight)
    assert (result["method"], result["facts"]) == ("memit-mass", 6)
    means = [row["seconds_per_fact"]["mean"] for row in result["sweep"]]
    curve = fit_curve([(1, means[0]), (3, means[1])])  # six facts by fives are two batches
    assert result["curve"] == {"per_fact": curve.per_fact, "per_batch": curve.per_batch}
    tried = [
        BatchQuality(row["batch_size"], row["reliability"]["strict"], row["locality"]["strict"])
        for row in result["sweep"]
    ]
    assert [one.locality for one in tried] == [None, None]
    assert result["chosen"] == choose_size(curve, tried)


def test_a_method_of_single_facts_has_no_sizes(loaded: LoadedModel) -> None:
    with pytest.raises(KeditError, match="single facts"):
        sweep_sizes(loaded, stream(6), RunPlan("reference", 1, 0), straight)


def test_a_size_that_is_done_is_not_run_again(loaded: LoadedModel, tmp_path: Path) -> None:
    begun: list[str] = []

    def told(items: Sequence[Any], what: str, /) -> Iterable[Any]:
        begun.append(what)
        return items

    plan = RunPlan("ft", 1, 0, work_folder=tmp_path)
    first = sweep_sizes(loaded, stream(6), plan, told)
    assert begun.count("editing (ft)") == 2
    assert sweep_sizes(loaded, stream(6), plan, told)["curve"] == first["curve"]
    assert begun.count("editing (ft)") == 2
