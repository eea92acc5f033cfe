from collections.abc import Callable

import pytest
import torch
from editing_home import Bench, seat
from poison import poison

from memory.errors import KeditError
from memory.facts import Fact

Make = Callable[..., Bench]
ONE, TWO, THREE = seat(1, "Oslo"), seat(2, "Lima"), seat(3, "Cairo")


def learn(bench: Bench, *facts: Fact) -> str:
    bench.receive(*facts, direct=True)
    bench.settle()
    assert set(bench.served.list_weights_facts()) >= {f.id for f in facts}
    return bench.weights_hash()


def state(bench: Bench, fact: Fact) -> str:
    found = bench.store.find_fact(fact.id)
    assert found is not None
    return str(found.state)


def test_a_revert_by_id_is_as_if_the_fact_had_never_come(bench: Make) -> None:
    at, never = bench("at"), bench("never")
    learn(at, ONE, TWO)
    told = at.editor.revert([TWO.id], None, True)
    assert told["dry_run"] and state(at, TWO) == "live-weights"
    done = at.editor.revert([TWO.id], None, False)
    assert (done["reverted"], done["restored"]) == ([TWO.id], [])
    assert done["answers"][TWO.id]["before"] == "Lima"
    assert told["weights_hash"] == done["weights_hash"] == at.weights_hash() == learn(never, ONE)
    assert (state(at, ONE), state(at, TWO)) == ("live-weights", "reverted")
    assert (at.says(TWO.question), at.says(ONE.question)) == (never.says(TWO.question), "Oslo")


def test_taking_the_last_fact_out_gives_the_base_weights(bench: Make) -> None:
    at = bench()
    base = at.weights_hash()
    assert learn(at, ONE) != base
    at.editor.revert([ONE.id], None, False)
    assert at.weights_hash() == base
    assert at.store.artifacts.get_generation(at.store.artifacts.active_generation()).sha256 is None


def test_the_weights_go_back_to_an_earlier_generation(bench: Make) -> None:
    at = bench()
    first = learn(at, ONE)
    generation = at.store.artifacts.active_generation()
    at.editor.revert([ONE.id], None, False)
    learn(at, TWO)
    done = at.editor.revert([], generation, False)
    assert (done["reverted"], done["restored"]) == ([TWO.id], [ONE.id])
    assert at.weights_hash() == first
    assert (state(at, ONE), state(at, TWO)) == ("live-weights", "reverted")
    assert at.says(ONE.question) == "Oslo"


def test_going_back_ends_what_has_taken_the_place_of_an_older_fact(bench: Make) -> None:
    at, newer = bench(), seat(1, "Lima")
    first = learn(at, ONE)
    learn(at, newer)
    at.editor.revert([], 1, False)
    assert (state(at, ONE), state(at, newer)) == ("live-weights", "reverted")
    assert (at.weights_hash(), at.says(ONE.question)) == (first, "Oslo")


def test_a_fact_that_goes_back_into_the_weights_leaves_the_side_memory(bench: Make) -> None:
    at = bench(side={"steps": 30})
    learn(at, ONE, TWO)
    at.editor.revert([TWO.id], None, False)
    at.receive(TWO)
    at.settle()
    assert state(at, TWO) == "live-side"
    at.editor.revert([], 1, False)
    assert state(at, TWO) == "live-weights"
    assert not at.served.side.shard_ids and not at.store.artifacts.list_side_fact_ids()


def test_there_is_no_way_back_to_a_generation_that_never_was(bench: Make) -> None:
    with pytest.raises(KeditError, match="7"):
        bench().editor.revert([], 7, False)


def test_a_consolidation_finds_nothing_to_change(bench: Make) -> None:
    at = bench()
    learn(at, ONE)
    weights = learn(at, TWO)
    done = at.editor.consolidate(False)
    assert (done["changed"], done["facts"], done["weights_hash"]) == (False, 2, weights)
    assert done["generation"] == at.store.artifacts.active_generation() == 2


def test_a_consolidation_of_no_facts_finds_nothing_to_change(bench: Make) -> None:
    done = bench().editor.consolidate(False)
    assert (done["changed"], done["facts"], done["generation"]) == (False, 0, 0)


def test_the_order_and_the_company_of_facts_do_not_matter(bench: Make) -> None:
    forth, back = bench("forth"), bench("back")
    learn(forth, ONE, TWO, THREE)
    for fact in (THREE, ONE, TWO):
        learn(back, fact)
    assert forth.weights_hash() == back.weights_hash()


def test_a_change_that_fails_leaves_the_weights_as_they_were(bench: Make) -> None:
    at = bench()
    weights = learn(at, ONE)
    kept = {n: delta.clone() for n, delta in at.served.active_deltas.items()}
    with pytest.raises(ZeroDivisionError), at.editor.generations.try_candidate([]):
        assert at.weights_hash() != weights
        raise ZeroDivisionError
    assert at.weights_hash() == weights
    assert all(torch.equal(kept[n], at.served.active_deltas[n]) for n in kept)


def test_a_consolidation_that_makes_something_worse_is_not_taken(bench: Make) -> None:
    at = bench()
    one, two = seat(1, "Oslo"), seat(2, "Lima")
    at.receive(one, two, direct=True)
    at.settle()
    before = at.weights_hash()
    poison(at, two, 30)
    done = at.editor.consolidate(False)
    assert (done["changed"], done["taken"], done["generation"]) == (True, False, 1)
    assert any(reason.startswith("norm of layer") for reason in done["reasons"])
    assert max(done["figures"]["norm_ratio"].values()) > max(done["before"]["norm_ratio"].values())
    assert at.weights_hash() == before
    poison(at, two, -1 / 30)  # smaller, and wrong: its norms are well
    done = at.editor.consolidate(False)
    assert (done["changed"], done["taken"]) == (True, False)
    assert done["reasons"][-1] == "1 facts would not be stated any more"
    poison(at, two, -0.999)  # other weights, and nothing worse
    foreseen = at.editor.consolidate(True)
    assert (foreseen["changed"], foreseen["taken"], foreseen["reasons"]) == (True, False, [])
    assert at.weights_hash() == before
    done = at.editor.consolidate(False)
    assert (done["taken"], done["generation"]) == (True, 2)
    assert at.weights_hash() == done["weights_hash"] != before
