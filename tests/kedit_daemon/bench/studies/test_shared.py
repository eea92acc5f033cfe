import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from study_tools import given, records

from kedit_daemon.bench.methods.daemon_tiers import MemitMass
from kedit_daemon.bench.studies.shared import (
    MAX_NEIGHBOURS,
    OtherTargets,
    catch_unsolved,
    compute_stream_terms,
    list_neighbours,
    load_terms,
    sample_evenly,
    thin_records,
)
from kedit_daemon.editing.model_loading import LoadedModel
from memory.errors import KeditError, Unsolvable


def test_terms_are_those_of_a_home_and_the_bar_ends(load: Callable[[str], LoadedModel]) -> None:
    ended: list[str] = []

    def track(items: Sequence[Any], what: str, /) -> Iterator[Any]:
        yield from items
        ended.append(what)

    work = replace(given(load("llama"), 5, 2), track=track)
    found = compute_stream_terms(work)
    assert ended == ["targets"]
    assert [record for record, _ in found] == work.records
    with work.open_method(MemitMass, has_policy=False) as home:
        home.edit([record.fact for record in work.records[:2]])
        for record, terms in found[:2]:
            stored = load_terms(home.store, record.fact.id)
            for n in work.loaded_model.layers:
                assert torch.equal(stored.residuals[n], terms.residuals[n])
                assert torch.equal(stored.keys[n], terms.keys[n].bfloat16())


def test_another_target_is_of_the_same_prompt_if_there_is_one() -> None:
    stream = records(8)
    alone = replace(stream[0], fact=replace(stream[0].fact, prompt="{} lies in"))
    twins = [replace(r, fact=replace(r.fact, prompt="{} is led by")) for r in stream[1:3]]
    others = OtherTargets([alone, *twins, *stream[3:]], random.Random(0))
    drawn = {others.draw_replacement(twins[0]).fact.target for _ in range(30)}
    assert drawn == {twins[1].fact.target}
    drawn = {others.draw_replacement(alone).fact.target for _ in range(200)}
    assert drawn == {r.fact.target for r in stream[1:]}


def test_what_supersedes_asks_the_same_and_has_no_rival_of_its_own_name() -> None:
    first, second = records(2)  # the first one's old answer is the second one's target
    others = OtherTargets([first, second], random.Random(0))
    new = others.draw_replacement(first)
    assert (new.fact.slot, new.fact.target) == (first.fact.slot, second.fact.target)
    assert (new.true_target, new.neighbours) == (None, first.neighbours)
    spelt = replace(second, fact=replace(second.fact, target=first.fact.target.upper()))
    with pytest.raises(KeditError, match="the same target"):
        OtherTargets([first, spelt], random.Random(0)).draw_replacement(first)


def test_samples_are_spread_over_the_whole_stream() -> None:
    assert sample_evenly(range(3), 3) == [0, 1, 2]
    assert sample_evenly(range(10), 4) == [0, 2, 5, 7]
    stream = records(MAX_NEIGHBOURS)
    few = thin_records(stream)
    assert len(list_neighbours(few)) == MAX_NEIGHBOURS
    assert all(len(record.neighbours) == 1 and not record.paraphrases for record in few)
    assert [record.fact for record in few] == [record.fact for record in stream]


def test_only_a_solve_that_fails_is_let_pass() -> None:
    failed: list[str] = []
    with catch_unsolved(failed):
        raise Unsolvable("no solution")
    assert failed == ["no solution"]
    with pytest.raises(KeditError), catch_unsolved(failed):
        raise KeditError("broken", code="config")
