from collections.abc import Callable

import pytest
import torch
from editing_home import Bench, seat

from kedit_daemon.editing import generations
from memory.db.rows import GenerationRow
from memory.errors import KeditError, ends_daemon
from memory.facts import Fact, FactState

STEPS = {"steps": 300}
Make = Callable[..., Bench]


def states(bench: Bench) -> dict[str, str]:
    return {f.id: str(f.state) for f in bench.store.list_facts()}


def test_facts_go_live_in_the_side_memory_and_ask_names_the_one_that_fired(bench: Make) -> None:
    at = bench(side=STEPS)
    base, one, two = at.weights_hash(), seat(1, "Oslo"), seat(2, "Lima")
    at.receive(one, two)
    at.settle()
    assert states(at) == {one.id: "live-side", two.id: "live-side"}
    assert (at.says(one.question), at.says(two.question)) == ("Oslo", "Lima")
    assert at.weights_hash() == base
    told = at.editor.answer_prompt(one.question, 12, True, True)
    assert (told["answer"], told["generation"]) == ("Oslo", 0)
    assert told["base_answer"] != "Oslo"
    (fired,) = told["fired"]
    assert (fired["fact"], fired["tier"], fired["target"]) == (one.id, "side", "Oslo")
    assert fired["margin"] >= 1
    assert at.editor.answer_prompt("The weather of today is", 4, False, True)["fired"] == []
    at.editor.run_flush(False)
    (fired,) = at.editor.answer_prompt(one.question, 12, False, True)["fired"]
    assert (fired["fact"], fired["tier"], fired["score"]) == (one.id, "weights", None)


def test_a_fact_that_cannot_be_read_is_rejected_and_the_others_live(bench: Make) -> None:
    at = bench(side=STEPS)
    long = Fact("country 9", "The seat of {} " + "in the long run " * 100 + "is", "Rome")
    one, two = seat(1, "Oslo"), seat(2, "Lima")
    at.receive(one, long, two)
    at.settle()
    assert states(at) == {one.id: "live-side", long.id: "rejected", two.id: "live-side"}
    reason = at.store.list_facts((FactState.REJECTED,))[0].reason
    assert reason is not None and "does not fit the model" in reason
    at.receive(long, direct=True)
    at.settle()
    assert states(at)[long.id] == "rejected"


def test_facts_that_have_waited_long_enough_are_flushed(bench: Make) -> None:
    at = bench(side=STEPS, routing={"flush_age_seconds": 3600.0})
    one = seat(1, "Oslo")
    at.receive(one)
    at.settle()
    at.clock.pass_time(minutes=59)
    assert not at.editor.step()
    at.clock.pass_time(minutes=1)
    assert at.editor.step()
    assert states(at) == {one.id: "live-weights"}
    assert at.says(one.question) == "Oslo"
    assert "side memory for 3600 s" in at.store.artifacts.get_generation(1).reason


def test_a_fact_whose_time_is_over_expires_in_either_tier(bench: Make) -> None:
    at, until = bench(side=STEPS), "2026-01-02T00:00:00.000Z"
    base = at.weights_hash()
    in_weights, beside = seat(1, "Oslo", valid_until=until), seat(2, "Lima", valid_until=until)
    at.receive(in_weights, direct=True)
    at.settle()
    at.receive(beside)
    at.settle()
    assert states(at) == {in_weights.id: "live-weights", beside.id: "live-side"}
    assert at.editor.expire_facts() == 0
    at.clock.pass_time(days=1)
    assert at.editor.expire_facts() == 2
    assert states(at) == {in_weights.id: "expired", beside.id: "expired"}
    assert at.weights_hash() == base
    assert at.says(beside.question) != "Lima"
    assert at.editor.expire_facts() == 0


def test_reverting_an_unknown_or_ended_fact_is_refused(bench: Make) -> None:
    at = bench(side=STEPS)
    with pytest.raises(KeditError, match="fact 0123456789ab is unknown") as caught:
        at.editor.revert(["0123456789ab"], None, False)
    assert caught.value.code == "unknown-fact"
    one = seat(1, "Oslo")
    at.receive(one)
    at.editor.revert([one.id], None, False)
    with pytest.raises(KeditError, match="reverted already"):
        at.editor.revert([one.id], None, False)


def test_of_two_waiting_facts_in_one_slot_the_newer_is_learned(bench: Make) -> None:
    at = bench(side=STEPS)
    old, new = seat(1, "Oslo"), seat(1, "Lima")
    at.receive(old, new)
    at.settle()
    assert states(at) == {old.id: "superseded", new.id: "live-side"}
    assert at.says(new.question) == "Lima"


def test_what_no_longer_holds_beside_new_weights_leaves_the_side_memory_with_the_switch(
    bench: Make,
) -> None:
    at, one, two = bench(side=STEPS), seat(1, "Oslo"), seat(2, "Lima")
    at.receive(one)
    at.settle()
    at.receive(two, direct=True)
    shard = at.served.side.shards[at.served.side.shard_ids[one.id]]
    shard.delta.up.neg_()  # as if it did not hold over the new weights
    pruned = list[dict[str, str]]()
    at.served.prune_side = lambda: pruned.append(states(at))  # type: ignore[method-assign]
    at.editor.flush.flush_batch(at.store.list_facts((FactState.RECEIVED,)), "test", False)
    # With the transaction of the switch: a crash leaves no wrong answer behind it.
    assert pruned == [{one.id: "received", two.id: "live-weights"}]
    at.restart()
    at.settle()
    assert states(at)[one.id] == "live-side"
    assert at.says(one.question) == "Oslo"


@pytest.mark.parametrize("direct", [True, False], ids=["flush", "side"])
def test_a_damaged_database_ends_the_daemon_and_is_no_facts_fault(
    bench: Make, direct: bool
) -> None:
    at = bench(side=STEPS)
    at.receive(seat(1, "Oslo"), direct=True)
    at.settle()
    newer = seat(1, "Lima")  # takes the place of what is in the weights: a generation is made
    at.receive(newer, direct=direct)
    real = at.store.artifacts.get_generation

    def damaged_row(number: int) -> GenerationRow:
        with at.store.db.transaction():
            at.store.db.conn.execute("UPDATE generations SET figures = '{' WHERE id = ?", (number,))
        return real(number)

    at.store.artifacts.get_generation = damaged_row  # type: ignore[method-assign]
    with pytest.raises(KeditError, match="generation 1 in the database is damaged") as caught:
        at.editor.step()
    assert ends_daemon(caught.value)
    assert (at.store.find_fact(newer.id).state, at.store.find_fact(newer.id).attempts) == (
        "received",
        0,
    )


@pytest.mark.parametrize("error", [RuntimeError("no"), torch.OutOfMemoryError("none left")])
def test_what_fails_after_facts_are_live_is_not_their_fault(
    bench: Make, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = bench(side=STEPS)
    at.receive(seat(1, "Oslo"), direct=True)
    at.settle()
    newer = seat(1, "Lima")
    at.receive(newer)
    waiting = at.store.find_fact(newer.id)

    # Its shard was trained over what leaves the weights now.
    monkeypatch.setattr(generations, "is_right_answer", lambda *_: True)

    prune = at.served.prune_side

    def fail_once() -> None:
        at.served.prune_side = prune  # type: ignore[method-assign]
        raise error

    at.served.prune_side = fail_once  # type: ignore[method-assign]
    assert at.editor.step() and not at.editor.step()
    live = at.store.find_fact(newer.id)
    assert (live.state, live.attempts) == (FactState.LIVE_SIDE, 0)
    with at.store.db.transaction():
        for _ in range(4):
            at.editor.lifecycle.record_failed_attempt(waiting, "side", "read before it was live")
    assert at.store.find_fact(newer.id).state is FactState.LIVE_SIDE
