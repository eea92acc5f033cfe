from collections.abc import Callable

import pytest
from study_tools import given

from kedit_daemon.bench.methods.daemon_tiers import MemitMass
from kedit_daemon.bench.studies.exactness import ExactnessStudy, compare_weights
from kedit_daemon.editing.model_loading import LoadedModel


@pytest.fixture
def loaded(load: Callable[[str], LoadedModel]) -> LoadedModel:
    return load("llama")


def test_a_home_with_a_past_is_as_one_without(loaded: LoadedModel) -> None:
    work = given(loaded, 10, 4)
    result = ExactnessStudy().run(work)
    assert (result["superseded"], result["reverted"], result["surviving"]) == (3, 2, 8)
    assert result["not_edited"] == 0
    for state in result["consolidation"].values():
        assert state["same_hash"] and state["first"] == state["fresh"]
        assert {far["of_change"] for far in state["difference"].values()} == {0.0}
    assert result["first"] == result["fresh"]
    assert result["first"]["reliability"]["strict"] == 1.0
    assert result["as_base"]["reverted"] == result["as_base"]["fresh"]
    assert [row["live"] for row in result["rows"]][:3] == [4, 8, 10]
    assert result["rows"][-1]["live"] == 8
    assert {row["change"] for row in result["rows"]} == {"add", "supersede", "revert"}
    text = "\n".join(ExactnessStudy().format_lines(result))
    assert "after consolidating: the sha256 of the weights agree" in text
    assert "superseded 3, reverted 2, surviving 8, not edited 0" in text


def test_weights_that_differ_are_told_in_two_lengths(loaded: LoadedModel) -> None:
    work = given(loaded, 3, 3)
    facts = [record.fact for record in work.records]
    with (
        work.open_method(MemitMass, has_policy=False) as one,
        work.open_method(MemitMass, has_policy=False) as other,
    ):
        one.edit(facts)
        other.edit(facts[:2])
        found = compare_weights(loaded, one, other)
    assert not found["same_hash"]
    for far in found["difference"].values():
        assert 0 < far["of_weights"] < far["of_change"]
    loaded.model.set_deltas({})
