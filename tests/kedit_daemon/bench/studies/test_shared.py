import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from study_tools import given, records

from kedit_daemon.bench.studies.shared import (
    NEIGHBOURS,
    OtherTargets,
    home_for,
    neighbours_of,
    spread,
    stored_terms,
    terms_of,
    thinned,
    unsolved,
)
from kedit_daemon.editing.model_loading import Loaded
from memory.errors import KeditError


def test_terms_are_those_of_a_home_and_the_bar_ends(load: Callable[[str], Loaded]) -> None:
    ended: list[str] = []

    def track(items: Sequence[Any], what: str, /) -> Iterator[Any]:
        yield from items
        ended.append(what)

    work = replace(given(load("llama"), 5, 2), track=track)
    found = terms_of(work)
    assert ended == ["targets"]
    assert [record for record, _ in found] == work.records
    with home_for(work) as home:
        home.edit([record.fact for record in work.records[:2]])
        for record, terms in found[:2]:
            stored = stored_terms(home.store, record.fact.id)
            for n in work.loaded.layers:
                assert torch.equal(stored.residuals[n], terms.residuals[n])
                assert torch.equal(stored.keys[n], terms.keys[n].bfloat16())


def test_another_target_is_of_the_same_prompt_if_there_is_one() -> None:
    stream = records(8)
    alone = replace(stream[0], fact=replace(stream[0].fact, prompt="{} lies in"))
    twins = [replace(r, fact=replace(r.fact, prompt="{} is led by")) for r in stream[1:3]]
    others = OtherTargets([alone, *twins, *stream[3:]], random.Random(0))
    drawn = {others.superseding(twins[0]).fact.target for _ in range(30)}
    assert drawn == {twins[1].fact.target}
    drawn = {others.superseding(alone).fact.target for _ in range(200)}
    assert drawn == {r.fact.target for r in stream[1:]}


def test_what_supersedes_asks_the_same_and_has_no_rival_of_its_own_name() -> None:
    first, second = records(2)  # the first one's old answer is the second one's target
    others = OtherTargets([first, second], random.Random(0))
    new = others.superseding(first)
    assert (new.fact.slot, new.fact.target) == (first.fact.slot, second.fact.target)
    assert (new.true_target, new.neighbours) == (None, first.neighbours)
    spelt = replace(second, fact=replace(second.fact, target=first.fact.target.upper()))
    with pytest.raises(KeditError, match="one target"):
        OtherTargets([first, spelt], random.Random(0)).superseding(first)


def test_samples_are_spread_over_the_whole_stream() -> None:
    assert spread(range(3), 3) == [0, 1, 2]
    assert spread(range(10), 4) == [0, 2, 5, 7]
    stream = records(NEIGHBOURS)
    few = thinned(stream)
    assert len(neighbours_of(few)) == NEIGHBOURS
    assert all(len(record.neighbours) == 1 and not record.paraphrases for record in few)
    assert [record.fact for record in few] == [record.fact for record in stream]


def test_only_a_solve_that_fails_is_let_pass() -> None:
    failed: list[str] = []
    with unsolved(failed):
        raise KeditError("no solution", code="singular")
    assert failed == ["no solution"]
    with pytest.raises(KeditError), unsolved(failed):
        raise KeditError("broken", code="config")
