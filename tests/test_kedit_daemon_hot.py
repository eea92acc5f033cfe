from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import Bench, seat
from torch import Tensor

from kedit_daemon import hot
from kedit_daemon.hot import Hot, cannot_learn
from memory.errors import KeditError
from memory.facts import Fact, State
from policies.probe import Probe, compare

STEPS = {"steps": 300}
Make = Callable[..., Bench]
ONE, TWO = seat(1, "Oslo"), seat(2, "Lima")


def test_a_learned_fact_has_its_shard_keys_and_probe_in_the_store(bench: Make) -> None:
    at = bench(side=STEPS)
    at.receive(ONE)
    (waiting,) = at.store.facts((State.RECEIVED,))
    assert at.editor.hot.take([waiting]) == [ONE.id]
    assert at.pulses
    (row,) = at.store.side_rows()
    assert (row.fact_id, row.shard) == (ONE.id, 1)
    (shard,) = at.store.shards()
    assert (at.home.side / f"{shard.sha256}.safetensors").is_file()
    stored = at.store.fact(ONE.id)
    assert stored is not None and stored.probe is not None
    assert (stored.tier, stored.after, stored.probe["right"]) == ("side", "Oslo", True)


def test_a_second_fact_joins_the_open_shard_and_the_first_still_holds(bench: Make) -> None:
    at = bench(side=STEPS)
    at.receive(ONE)
    at.settle()
    at.receive(TWO)
    at.settle()
    assert set(at.served.side.shard_of.values()) == {1}
    assert (at.says(ONE.question), at.says(TWO.question)) == ("Oslo", "Lima")


def test_what_is_not_said_tries_the_weights_and_leaves_no_trace(bench: Make) -> None:
    at = bench(side={"steps": 1})
    at.receive(ONE)
    at.editor.step()
    stored = at.store.fact(ONE.id)
    assert stored is not None and (stored.state, stored.attempts) == (State.RECEIVED, 1)
    assert (at.store.side_rows(), at.store.shards(), at.served.side.shards) == ([], [], {})
    at.settle()
    stored = at.store.fact(ONE.id)
    assert stored is not None and stored.state is State.LIVE_WEIGHTS


def test_a_newer_fact_ends_an_older_one_in_the_weights(bench: Make) -> None:
    at, newer = bench(side=STEPS), seat(1, "Lima")
    base = at.weights_hash()
    at.receive(ONE, direct=True)
    at.settle()
    at.receive(newer)
    at.settle()
    assert [str(f.state) for f in at.store.facts()] == ["superseded", "live-side"]
    assert at.says(newer.question) == "Lima"
    assert (at.weights_hash(), at.served.weights_facts()) == (base, [])


def test_a_newer_fact_ends_an_older_one_beside_it(bench: Make) -> None:
    at, newer = bench(side=STEPS), seat(1, "Lima")
    for fact in (ONE, newer):
        at.receive(fact)
        at.settle()
    assert [str(f.state) for f in at.store.facts()] == ["superseded", "live-side"]
    assert set(at.served.side.shard_of) == {newer.id}
    assert at.says(newer.question) == "Lima"


def test_a_failure_between_learning_and_writing_undoes_the_learning(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = bench(side=STEPS)
    at.receive(ONE)
    at.settle()
    shard = at.served.side.shards[1]

    def broken(*_: object) -> None:
        raise KeditError("the disk is full", code="disk")

    monkeypatch.setattr(Hot, "_keep", broken)
    at.receive(TWO)
    with pytest.raises(KeditError, match="disk"):
        at.editor.hot.take(at.store.facts((State.RECEIVED,)))
    assert set(at.served.side.shard_of) == {ONE.id}
    assert at.served.side.shards[1] is shard


def test_the_reason_of_a_failure_is_a_sentence() -> None:
    known = KeditError("too long", code="rejected")
    assert cannot_learn(known) is known
    made = cannot_learn(ValueError("no such layer"))
    assert (made.code, str(made)) == ("unexpected", "unexpected: ValueError: no such layer")


def test_a_newer_fact_ends_an_older_one_in_another_shard(bench: Make) -> None:
    at, newer = bench(side={**STEPS, "shard_facts": 1}), seat(1, "Lima")
    for fact in (ONE, newer):
        at.receive(fact)
        at.settle()
    assert [(str(f.state), f.attempts) for f in at.store.facts()] == [
        ("superseded", 0),
        ("live-side", 0),
    ]
    assert (set(at.served.side.shards), at.says(newer.question)) == ({2}, "Lima")


def test_a_newer_fact_that_is_not_said_leaves_the_older_one_in_place(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, newer = bench(side=STEPS), seat(1, "Lima")
    at.receive(ONE)
    at.settle()

    def deaf(fact: Fact, before: list[str], after: list[str]) -> Probe:
        return replace(compare(fact, before, after), right=False)

    monkeypatch.setattr(hot, "compare", deaf)
    at.receive(newer)
    at.editor.step()
    assert [(str(f.state), f.attempts) for f in at.store.facts()] == [
        ("live-side", 0),
        ("received", 1),
    ]
    assert at.says(ONE.question) == "Oslo"


def test_neighbours_are_read_on_the_weights_as_they_are_served(bench: Make) -> None:
    at = bench(side=STEPS)

    def outside(hot: Hot) -> Tensor:
        return hot._outside([ONE, TWO])

    def fresh() -> Tensor:
        return outside(Hot(at.editor.flush, 16, 1, lambda: None))

    kept = at.editor.hot
    before = outside(kept)
    kept._outside([TWO])
    assert torch.allclose(outside(kept), before, atol=1e-5)
    assert torch.allclose(fresh(), before, atol=1e-5)
    at.served.model.set_deltas({0: at.served.model.base_weight(0) * 0.3})
    with at.store.transaction():
        at.store.activate(at.store.add_generation(None, "another", 0, "a flush", (), {}))
    after = outside(kept)
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.allclose(after, fresh(), atol=1e-5)
