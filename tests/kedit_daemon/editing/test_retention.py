from collections.abc import Callable

import pytest
from editing_home import Bench, seat

from kedit_daemon.editing import retention
from memory.facts import FactState

STEPS = {"steps": 300}
Make = Callable[..., Bench]


def states(bench: Bench) -> list[FactState]:
    return [f.state for f in bench.store.list_facts()]


def test_facts_that_are_not_stated_any_more_are_learned_anew(bench: Make) -> None:
    at = bench(side=STEPS)
    one, two, three = seat(1, "Oslo"), seat(2, "Lima"), seat(3, "Paris")
    at.receive(one, two, direct=True)
    at.settle()
    at.receive(three)
    at.settle()
    told = at.editor.auditor.retention.probe_retention()
    assert told == {"figures": {"oldest": 1.0, "sample": 1.0}, "learned_anew": []}
    shard = at.served.side.shards[at.served.side.shard_ids[three.id]]
    shard.delta.up.neg_()  # finite, and wrong
    told = at.editor.auditor.retention.probe_retention()
    assert told["figures"] == {name: pytest.approx(2 / 3) for name in ("oldest", "sample")}
    assert told["learned_anew"] == [three.id]
    at.settle()
    assert states(at) == [FactState.LIVE_WEIGHTS, FactState.LIVE_WEIGHTS, FactState.LIVE_SIDE]
    at.loaded.model.set_deltas({})  # as if the weights said nothing of what they hold
    told = at.editor.auditor.retention.probe_retention()
    assert told["figures"]["oldest"] <= 1 / 3  # what lies beside them was learned on other weights
    assert {one.id, two.id} <= set(told["learned_anew"])
    waiting = at.store.list_facts((FactState.RECEIVED,))
    assert {f.reason for f in waiting} == {"an audit found that it is not stated any more"}
    at.settle()
    assert [at.says(f.question) for f in (one, two, three)] == ["Oslo", "Lima", "Paris"]
    assert states(at) == [FactState.LIVE_SIDE] * 3
    assert at.served.list_weights_facts() == []


def test_audits_ask_the_others_in_the_weights_in_turn(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "OLDEST_COUNT", 1)
    monkeypatch.setattr(retention, "ROTATING_COUNT", 1)
    at = bench(side=STEPS)
    facts = [seat(1, "Oslo"), seat(2, "Lima"), seat(3, "Paris")]
    at.receive(*facts, direct=True)
    at.settle()
    assert states(at) == [FactState.LIVE_WEIGHTS] * 3
    asked = at.editor.auditor.retention
    assert [asked.ask_rotating(turn).stated_share for turn in range(3)] == [1, 1, 1]
    spoilt = facts[2]
    monkeypatch.setattr(retention, "is_right_answer", lambda _, fact: fact.target != spoilt.target)
    assert [[f.id for f in asked.ask_rotating(n).lost_facts] for n in range(4)] == [
        [],
        [spoilt.id],
    ] * 2
    told = [at.editor.audit() for _ in range(2)]
    assert [one["figures"]["retention"] for one in told] == [1, 1]
    assert sorted(one["learned_anew"] for one in told) == [[], [spoilt.id]]


def test_a_probe_without_facts_finds_nothing(bench: Make) -> None:
    told = bench().editor.auditor.retention.probe_retention()
    assert told == {"figures": {"oldest": None, "sample": None}, "learned_anew": []}
