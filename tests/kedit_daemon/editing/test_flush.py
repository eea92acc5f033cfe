from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from editing_home import LOOSE, Bench, seat

from kedit_daemon.editing import flush
from memory.db import meta_keys
from memory.facts import Fact, FactState
from policies import gibberish
from policies.edit_terms import Refusal
from policies.probe import Probe, compare_answers

STEPS = {"steps": 300}
STRICT = LOOSE["stability"] | {"norm_warn": 0.1, "norm_consolidate": 0.2, "norm_revert": 0.3}
Make = Callable[..., Bench]


def state(bench: Bench, fact_id: str) -> str:
    found = bench.store.find_fact(fact_id)
    assert found is not None
    return str(found.state)


def test_direct_facts_go_to_the_weights_and_say_how_it_went(bench: Make) -> None:
    at = bench()
    one, two = seat(1, "Oslo"), seat(2, "Lima")
    at.receive(one, two, direct=True)
    at.settle()
    for fact in (one, two):
        stored = at.store.find_fact(fact.id)
        assert stored is not None and stored.probe is not None
        assert (stored.state, stored.tier, stored.generation) == ("live-weights", "weights", 1)
        assert (stored.after, stored.probe["right"]) == (fact.target, True)
        assert stored.before != fact.target
        assert at.says(fact.question) == fact.target
    row = at.store.artifacts.get_generation(1)
    assert set(row.fact_ids) == {one.id, two.id}
    assert row.weights_hash == at.weights_hash()
    assert at.pulses
    assert not at.served.side.shard_ids


def test_nonsense_that_comes_for_the_weights_is_rejected_and_what_is_live_stays(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = bench(side=STEPS)
    live, drawn, other = seat(1, "Oslo Rome"), seat(2, "Lima Oslo"), seat(3, "7")
    at.receive(live)
    at.settle()
    assert state(at, live.id) == "live-side"
    monkeypatch.setattr(
        gibberish, "MAX_EVIDENCE", -1e9
    )  # whatever has a second token with a letter
    at.receive(drawn, other, direct=True)
    at.settle()
    assert (state(at, drawn.id), state(at, other.id)) == ("rejected", "live-weights")
    assert state(at, live.id) in ("live-side", "live-weights")
    assert at.says(live.question) == "Oslo Rome"


def test_what_is_live_beside_the_weights_stays_there_where_no_targets_can_be_found(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, one, two = bench(side={"steps": 30}), seat(1, "Oslo"), seat(2, "Lima")
    at.receive(one)
    at.settle()

    def refuse(*given: Any) -> None:
        facts, keep = given[3:]
        keep({fact.id: Refusal("the target's loss: not finite") for fact in facts})

    monkeypatch.setattr(flush, "compute_terms", refuse)
    at.receive(two, direct=True)
    at.settle()
    at.editor.run_flush(False)
    assert (state(at, one.id), state(at, two.id)) == ("live-side", "rejected")
    assert set(at.served.side.shard_ids) == {one.id} and at.says(one.question) == "Oslo"
    assert at.store.db.get_meta(meta_keys.FLUSH_HELD)  # or it would be tried again at once


def test_a_harmful_flush_publishes_nothing_and_holds_further_ones(bench: Make) -> None:
    at = bench(side=STEPS, stability=STRICT, routing={"flush_facts": 2})
    layer = at.loaded.layers[0]
    base, before = at.weights_hash(), at.loaded.model.weight(layer).detach().clone()
    one, two = seat(1, "Oslo"), seat(2, "Lima")
    at.receive(one, two)
    at.settle()
    assert at.store.db.get_meta(meta_keys.FLUSH_HELD) is not None
    assert at.store.artifacts.active_generation() == 0
    assert at.store.db.conn.execute("SELECT count(*) FROM generations").fetchone() == (1,)
    assert list(at.home.generations_folder.iterdir()) == []
    assert at.weights_hash() == base
    assert torch.equal(at.loaded.model.weight(layer), before)
    assert (state(at, one.id), state(at, two.id)) == ("live-side", "live-side")
    assert (at.says(one.question), at.says(two.question)) == ("Oslo", "Lima")
    kinds = [kind for (kind,) in at.store.db.conn.execute("SELECT kind FROM events")]
    assert kinds.count("flush_refused") == 1
    at.clock.pass_time(days=9)
    assert not at.editor.step()  # not by age either


def test_facts_that_a_refused_flush_leaves_waiting_go_beside_the_weights(bench: Make) -> None:
    at = bench(side=STEPS, stability=STRICT)
    one = seat(1, "Oslo")
    at.receive(one, direct=True)
    at.settle()
    stored = at.store.find_fact(one.id)
    assert stored is not None
    assert (stored.state, stored.attempts) == (FactState.LIVE_SIDE, 1)


def test_a_flush_that_is_taken_ends_the_hold(bench: Make) -> None:
    at = bench()
    with at.store.db.transaction():
        at.store.db.set_meta(meta_keys.FLUSH_HELD, "a reason")
    at.receive(seat(1, "Oslo"), direct=True)
    at.settle()
    assert at.store.artifacts.active_generation() == 1
    assert at.store.db.get_meta(meta_keys.FLUSH_HELD) is None


def test_a_later_fact_takes_the_place_of_an_older_one_exactly(bench: Make) -> None:
    at, only = bench("both"), bench("only")
    old, new = seat(1, "Oslo"), seat(1, "Lima")
    at.receive(old, direct=True)
    at.settle()
    assert at.says(old.question) == "Oslo"
    at.receive(new, direct=True)
    at.settle()
    only.receive(new, direct=True)
    only.settle()
    assert (state(at, old.id), state(at, new.id)) == ("superseded", "live-weights")
    assert at.says(new.question) == "Lima"
    assert at.weights_hash() == only.weights_hash()


def test_a_dry_run_changes_nothing(bench: Make) -> None:
    at = bench(side=STEPS)
    one = seat(1, "Oslo")
    at.receive(one)
    at.settle()
    base, index = at.weights_hash(), at.store.db.get_meta("index_sha256")
    done = at.editor.run_flush(True)
    assert (done["flushed"], done["dry_run"], done["generation"]) == ([one.id], True, 0)
    assert done["figures"]["norm_ratio"] != {}
    assert state(at, one.id) == "live-side"
    assert (at.weights_hash(), at.store.db.get_meta("index_sha256")) == (base, index)
    assert list(at.home.generations_folder.iterdir()) == []
    assert at.says(one.question) == "Oslo"


def test_an_empty_flush_is_harmless(bench: Make) -> None:
    at = bench()
    done = at.editor.run_flush(False)
    assert (done["flushed"], done["failed"], done["verdict"]) == ([], [], "keep")
    assert at.store.db.get_meta(meta_keys.FLUSH_HELD) is None


def test_a_newer_fact_takes_the_place_of_one_beside_the_weights(bench: Make) -> None:
    at, only = bench("both", side=STEPS), bench("only")
    old, new = seat(1, "Oslo"), seat(1, "Lima")
    at.receive(old)
    at.settle()
    at.receive(new, direct=True)
    at.settle()
    assert (state(at, old.id), state(at, new.id)) == ("superseded", "live-weights")
    only.receive(new, direct=True)
    only.settle()
    assert (at.says(new.question), at.weights_hash()) == ("Lima", only.weights_hash())


def test_a_newer_fact_that_does_not_hold_ends_nothing(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = bench(side=STEPS)
    old, new, other = seat(1, "Oslo"), seat(1, "Lima"), seat(2, "Cairo")
    at.receive(old, direct=True)
    at.settle()

    def deaf(fact: Fact, before: list[str], after: list[str]) -> Probe:
        return replace(compare_answers(fact, before, after), right=fact.id != new.id)

    monkeypatch.setattr(flush, "compare_answers", deaf)
    at.receive(new, other, direct=True)
    done = at.editor.run_flush(False)
    assert (done["flushed"], done["failed"]) == ([other.id], [new.id])
    assert state(at, old.id) == "live-weights"
    assert set(at.served.list_weights_facts()) == {old.id, other.id}
    assert at.says(old.question) == "Oslo"


def test_a_flush_that_is_not_selective_takes_what_does_not_hold_too(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = bench()
    one, two = seat(1, "Oslo"), seat(2, "Lima")

    def deaf(fact: Fact, before: list[str], after: list[str]) -> Probe:
        return replace(compare_answers(fact, before, after), right=fact.id != one.id)

    monkeypatch.setattr(flush, "compare_answers", deaf)
    at.editor.flush.is_selective = False
    at.receive(one, two, direct=True)
    done = at.editor.run_flush(False)
    assert (set(done["flushed"]), done["failed"]) == ({one.id, two.id}, [])
    stored = at.store.find_fact(one.id)
    assert stored is not None and stored.probe is not None
    assert (stored.state, stored.probe["right"]) == ("live-weights", False)
    assert set(at.served.list_weights_facts()) == {one.id, two.id}


@pytest.mark.parametrize("direct", [True, False])
def test_only_facts_that_would_be_tried_without_end_hold_flushes_back(
    bench: Make, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    at = bench(side=STEPS)
    at.receive(seat(1, "Oslo"), direct=direct)
    if not direct:
        at.settle()
    monkeypatch.setattr(
        flush, "compare_answers", lambda *said: replace(compare_answers(*said), right=False)
    )
    assert at.editor.run_flush(False)["flushed"] == []
    assert (at.store.db.get_meta(meta_keys.FLUSH_HELD) is None) is direct


def test_a_fact_that_only_the_side_memory_may_take_is_not_tried_without_end(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "policies.target_optimiser.check_target_length", lambda _lengths, _anchors: "too long"
    )
    at = bench(side=STEPS)
    one = seat(1, "Oslo")
    at.receive(one)
    at.settle()
    events = at.store.db.conn.execute("SELECT count(*) FROM events").fetchone()
    tried = at.editor.run_flush(True)
    assert (tried["kept"], tried["failed"]) == ([one.id], [])
    assert at.store.db.conn.execute("SELECT count(*) FROM events").fetchone() == events
    at.clock.pass_time(days=9)
    assert at.editor.step()  # by age
    assert state(at, one.id) == "live-side"
    assert at.says(one.question) == "Oslo"
    assert at.store.db.get_meta(meta_keys.FLUSH_HELD) is not None
    assert not at.editor.step()
