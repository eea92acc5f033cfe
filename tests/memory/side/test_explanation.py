"""Why a fact fires for a sentence or does not, over shards made by hand."""

from dataclasses import replace

import pytest
from side_tools import FIRST, ONE, SECOND, TWO, side_of

from memory.model.editable import EditableModel
from memory.side.explanation import NamedFact, Reason, explain_prompt
from memory.side.shards import Shard
from memory.side.side_memory import SideMemory


@pytest.fixture
def side(model: EditableModel) -> SideMemory:
    side = side_of(model, {ONE: FIRST, TWO: SECOND})
    for fact_id, prompt in ((ONE, FIRST), (TWO, SECOND)):
        names = [prompt.removeprefix("The seat of ").removesuffix(" is")]
        side.subject_matcher.add_names(fact_id, names)
    return side


def explain(side: SideMemory, prompt: str) -> dict[str, NamedFact]:
    found = explain_prompt(side, side.model.encode(prompt))
    assert found.question is None
    return {named.fact_id: named for named in found.named}


def test_each_gate_is_named(side: SideMemory) -> None:
    assert explain(side, "It rains. It is warm") == {}
    fired = explain(side, FIRST)[ONE]
    assert (fired.reason, fired.end_cosine) == (Reason.FIRED, pytest.approx(1, abs=1e-3))
    silent = explain(side, f"{FIRST} Rome. It is")[ONE]
    assert silent.reason is Reason.OTHER_END
    assert silent.end_cosine < side.gates.min_end_cosine
    side.gates = replace(side.gates, min_subject_cosine=1.5, min_unnamed_cosine=1.5)
    assert explain(side, FIRST)[ONE].reason is Reason.OTHER_SUBJECT
    side.gates = replace(side.gates, min_subject_cosine=-1.0)
    shard = side.shards[side.shard_ids[ONE]]
    side.shards[side.shard_ids[ONE]] = Shard(shard.delta, 1e9)
    named = explain(side, FIRST)[ONE]
    assert (named.reason, named.margin < 1) == (Reason.LOW_MARGIN, True)


def test_a_fact_that_another_one_beats_comes_behind_it(side: SideMemory) -> None:
    side.gates = replace(side.gates, min_end_cosine=-1.0, min_subject_cosine=-1.0)
    first, second = explain(side, f"{SECOND} Rome. {FIRST}").values()
    assert (first.reason, second.reason) == (Reason.FIRED, Reason.OTHER_FACT)
    assert first.end_cosine > second.end_cosine
