import subprocess
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kedit_daemon.bench.dataset import BenchRecord, FactStream, SkippedRecord
from kedit_daemon.bench.measure import ProgressTracker
from kedit_daemon.bench.resume import RunProgress
from kedit_daemon.bench.run import RunPlan, describe_commit, read_peak_memory, run_plan
from kedit_daemon.editing.generations import Generations
from kedit_daemon.editing.model_loading import LoadedModel
from memory.errors import KeditError
from memory.facts import Fact, Neighbour
from policies.targets import compute_terms

KEYS = {
    *("reliability", "generality", "locality", "retention", "perplexity", "norm_ratio"),
    *("seconds_per_fact", "peak_memory_bytes", "bytes_per_fact", "model", "seed", "commit"),
    *("device", "method", "batch_size", "policy", "facts", "skipped", "not_edited"),
    "site",
}
MEASURES = {"prob", "tokens", "strict", "generation"}


def straight(items: Sequence[Any], _what: str, /) -> Iterable[Any]:
    return items


def stream() -> FactStream:
    cities = ("Oslo", "Lima", "Cairo", "Quito", "Paris")
    records = tuple(
        BenchRecord(
            Fact(f"country {n}", "The seat of {} is", city),
            "Rome",
            (f"The seat of the old country {n} is",),
            (Neighbour(f"The seat of country {n + 20} is", "Rome"),),
        )
        for n, city in enumerate(cities)
    )
    return FactStream(records, (SkippedRecord(3, "broken"),))


@pytest.fixture
def loaded(load: Callable[[str], LoadedModel]) -> LoadedModel:
    return load("llama")


def test_the_keys_are_those_of_the_contract(loaded: LoadedModel) -> None:
    plan = RunPlan("memit-mass", 2, 5, baseline="none", has_policy=False)
    result = run_plan(loaded, stream(), plan, straight)
    assert set(result) == KEYS | {"baseline"}
    assert set(result["baseline"]) == KEYS
    for one in (result, result["baseline"]):
        for column in ("reliability", "generality", "locality"):
            assert set(one[column]) == MEASURES
        assert set(one["perplexity"]) == {"before", "after"}
        assert set(one["seconds_per_fact"]) == {"median", "mean", "p95", "parts"}
        assert set(one["norm_ratio"]) == {f"layer.{n}.down_proj" for n in loaded.layers}
        assert (one["seed"], one["facts"], one["skipped"]) == (5, 5, 1)
    assert (result["method"], result["batch_size"], result["not_edited"]) == ("memit-mass", 2, 0)
    assert result["reliability"] == {"prob": 1, "tokens": 1, "strict": 1, "generation": 1}
    assert result["bytes_per_fact"] > 0
    assert all(ratio > 1 for ratio in result["norm_ratio"].values())


def test_the_baseline_starts_from_the_unedited_model_and_the_model_ends_as_it_was(
    loaded: LoadedModel,
) -> None:
    base = loaded.model.weights_hash(range(loaded.model.layer_count))
    alone = run_plan(loaded, stream(), RunPlan("none", 2, 0), straight)
    after = run_plan(loaded, stream(), RunPlan("ft", 5, 0, baseline="none"), straight)
    assert loaded.model.weights_hash(range(loaded.model.layer_count)) == base
    for key in ("reliability", "generality", "locality", "perplexity", "norm_ratio"):
        assert after["baseline"][key] == alone[key]
    assert after["norm_ratio"] != alone["norm_ratio"]
    assert alone["locality"] == alone["locality"] | {"tokens": 1, "strict": 1, "generation": 1}
    assert alone["perplexity"]["before"] == pytest.approx(alone["perplexity"]["after"])
    assert alone["not_edited"] == 5


def test_all_facts_are_measured_also_those_that_the_policy_kept_out(loaded: LoadedModel) -> None:
    result = run_plan(loaded, stream(), RunPlan("memit-mass", 5, 0), straight)
    assert result["not_edited"] == 5
    assert result["retention"] == [{"first": 0, "facts": 5, "strict": 0.0, "generation": 0.0}]


def test_batches_are_as_large_as_asked_or_single_facts(loaded: LoadedModel) -> None:
    seen: dict[str, list[int]] = {}

    def watch(items: Sequence[Any], what: str, /) -> Iterable[Any]:
        seen[what] = [len(item) for item in items]
        return items

    result = run_plan(loaded, stream(), RunPlan("none", 2, 0, baseline="reference"), watch)
    assert seen["editing (none)"] == [2, 2, 1]
    assert seen["editing (reference)"] == [1] * 5
    assert (result["batch_size"], result["baseline"]["batch_size"]) == (2, 1)


def test_the_commit_is_the_checkouts_and_not_that_of_one_around_it(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("commit", "--allow-empty", "-m", "one")
    assert describe_commit(tmp_path) == git("rev-parse", "--short=12", "HEAD")
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert describe_commit(inside) == describe_commit(tmp_path / "nowhere") == "0.1.0"


def test_memory_is_in_bytes() -> None:
    assert 2**26 < read_peak_memory() < 2**36  # torch alone takes more than 64 MiB


def test_a_baseline_that_cannot_run_is_refused_before_the_method_runs(loaded: LoadedModel) -> None:
    begun: list[str] = []

    def told(items: Sequence[Any], what: str, /) -> Iterable[Any]:
        begun.append(what)
        return items

    with pytest.raises(KeditError):
        run_plan(loaded, stream(), RunPlan("none", 2, 0, "alphaedit"), told)
    assert begun == []


class Cut(Exception):
    """Stands for whatever ends a run."""


def cut_after(batches: int) -> ProgressTracker:
    """Stops the work on the stream after so many batches."""

    def track(items: Sequence[Any], what: str, /) -> Iterable[Any]:
        for number, item in enumerate(items):
            if what.startswith("editing") and number == batches:
                raise Cut
            yield item

    return track


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The facts whose terms are computed, as they are."""
    seen: list[str] = []

    def compute(model: Any, site: Any, norms: Any, facts: Sequence[Fact], *rest: Any) -> Any:
        seen.extend(fact.id for fact in facts)
        return compute_terms(model, site, norms, facts, *rest)

    monkeypatch.setattr("kedit_daemon.editing.flush.compute_terms", compute)
    return seen


SAME = ("reliability", "generality", "locality", "retention", "not_edited", "bytes_per_fact")


@pytest.mark.parametrize("method", ["memit-mass", "wise", "auto"])
def test_a_run_that_was_cut_off_goes_on_to_the_same_end(
    loaded: LoadedModel, tmp_path: Path, computed: list[str], method: str
) -> None:
    plan = RunPlan(method, 2, 0, has_policy=False)
    whole = run_plan(loaded, stream(), plan, straight)
    once, plan = sorted(computed), replace(plan, work_folder=tmp_path)
    computed.clear()
    for batches in (1, 1):  # of those that are left
        with pytest.raises(Cut):
            run_plan(loaded, stream(), plan, cut_after(batches))
    resumed = run_plan(loaded, stream(), plan, straight)
    assert {key: resumed[key] for key in SAME} == {key: whole[key] for key in SAME}
    for key in ("norm_ratio", "perplexity"):
        assert resumed[key] == pytest.approx(whole[key])
    assert sorted(computed) == once
    assert (method == "memit-mass") == (len(set(computed)) == len(computed) == 5)


def test_a_batch_that_was_cut_off_is_finished(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, computed: list[str]
) -> None:
    plan = RunPlan("memit-mass", 3, 0, has_policy=False)
    whole = run_plan(loaded, stream(), plan, straight)
    computed.clear()
    plan, real = replace(plan, work_folder=tmp_path), Generations.activate_candidate

    def cut(*given: Any) -> int:
        if len(computed) == 5:  # in the second batch
            raise Cut
        return real(*given)

    def cut_late(*given: Any) -> int:
        real(*given)
        raise Cut

    for way in (cut, cut_late):
        with monkeypatch.context() as patch, pytest.raises(Cut):
            patch.setattr(Generations, "activate_candidate", way)
            run_plan(loaded, stream(), plan, straight)
    before = RunProgress.load(tmp_path / "memit-mass-3")
    assert len(before.seconds) == 1 and before.begun > 0
    resumed = run_plan(loaded, stream(), plan, straight)
    assert {key: resumed[key] for key in SAME} == {key: whole[key] for key in SAME}
    assert len(set(computed)) == len(computed) == 5
    after = RunProgress.load(tmp_path / "memit-mass-3")
    assert after.seconds[0] == before.seconds[0] and after.seconds[1] > before.begun
    spent = resumed["seconds_per_fact"]
    assert 5 * spent["mean"] == pytest.approx(sum(after.seconds))


def test_a_method_without_a_store_begins_again_and_a_finished_one_does_not(
    loaded: LoadedModel, tmp_path: Path
) -> None:
    whole = run_plan(loaded, stream(), RunPlan("ft", 2, 0), straight)
    plan, begun = RunPlan("none", 2, 0, "ft", work_folder=tmp_path), list[str]()

    def told(items: Sequence[Any], what: str, /) -> Iterable[Any]:
        begun.append(what)
        return items

    with pytest.raises(Cut):
        run_plan(loaded, stream(), replace(plan, method="ft"), cut_after(2))
    result = run_plan(loaded, stream(), plan, told)
    assert result["baseline"]["reliability"] == whole["reliability"]
    assert result["baseline"]["norm_ratio"] == pytest.approx(whole["norm_ratio"])
    assert begun.count("editing (ft)") == 1
    begun.clear()
    again = run_plan(loaded, stream(), plan, told)
    assert begun == ["before"]
    assert again["baseline"]["seconds_per_fact"] == result["baseline"]["seconds_per_fact"]
