import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from editing_home import Bench, seat

from kedit_daemon.editing import side_learner
from kedit_daemon.editing.side_learner import (
    LONG_TARGET_TOKENS,
    OUTSIDE_NEIGHBOURS,
    SideLearner,
)
from memory.errors import KeditError
from memory.facts import Fact, FactState, Neighbour
from memory.side.shards import Shard
from policies import gibberish
from policies.edit_terms import Refusal
from policies.probe import Probe, compare_answers
from policies.wise import compute_keys, learn_shards, read_other_questions, read_prompt_ends

STEPS = {"steps": 300}
Make = Callable[..., Bench]
ONE, TWO, THREE = seat(1, "Oslo"), seat(2, "Lima"), seat(3, "Cairo")


def test_a_learned_fact_has_its_shard_keys_and_probe_in_the_store(bench: Make) -> None:
    at = bench(side=STEPS)
    at.receive(ONE)
    (waiting,) = at.store.list_facts((FactState.RECEIVED,))
    assert at.editor.side_learner.learn_batch([waiting]) == [ONE.id]
    assert at.pulses
    (row,) = at.store.artifacts.read_side_keys()
    assert (row.fact_id, row.shard) == (ONE.id, 1)
    (shard,) = at.store.artifacts.list_shards()
    assert (at.home.side_folder / f"{shard.sha256}.safetensors").is_file()
    stored = at.store.find_fact(ONE.id)
    assert stored is not None and stored.probe is not None
    assert (stored.tier, stored.after, stored.probe["right"]) == ("side", "Oslo", True)


def test_a_second_fact_has_a_shard_of_its_own_and_the_first_is_as_it_was(bench: Make) -> None:
    at = bench(side=STEPS)
    at.receive(ONE)
    at.settle()
    first = at.served.side.shards[1]
    at.receive(TWO)
    at.settle()
    assert at.served.side.shard_ids == {ONE.id: 1, TWO.id: 2}
    assert at.served.side.shards[1] is first
    assert (at.says(ONE.question), at.says(TWO.question)) == ("Oslo", "Lima")


def test_facts_that_come_together_are_learned_together_up_to_a_number(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def counted(*given: Any, **more: Any) -> list[Shard | Refusal]:
        sizes.append(len(given[2]))
        return learn_shards(*given, **more)

    monkeypatch.setattr(side_learner, "learn_shards", counted)
    at = bench(side={**STEPS, "batch_facts": 2})
    at.receive(ONE, TWO, seat(3, "Cairo"))
    at.settle()
    assert sizes == [2, 1]
    assert sorted(at.served.side.shard_ids.values()) == [1, 2, 3]
    assert [(row.id, row.facts) for row in at.store.artifacts.list_shards()] == [
        (1, 1),
        (2, 1),
        (3, 1),
    ]


def test_nonsense_is_rejected_and_its_company_learned(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        gibberish, "MAX_EVIDENCE", -1e9
    )  # whatever has a second token with a letter
    at = bench(side=STEPS)
    drawn, short = seat(8, "Oslo Rome Lima"), seat(9, "7")
    meant = replace(drawn, prompt="{} then is", tags=("verbatim",))
    at.receive(drawn, short, meant)
    at.settle()
    found = {n: at.store.find_fact(n) for n in (drawn.id, short.id, meant.id)}
    states = [stored.state for stored in found.values() if stored]
    assert states == [FactState.REJECTED, FactState.LIVE_SIDE, FactState.LIVE_SIDE]
    rejected = found[drawn.id]
    assert rejected is not None and "drawn blindly" in str(rejected.reason)
    assert rejected.attempts == 0 and drawn.id not in at.served.side.shard_ids


def test_a_long_target_is_learned_after_the_others_and_alone(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[list[str]] = []

    def noted(*given: Any, **more: Any) -> list[Shard | Refusal]:
        taken.append([fact.id for fact in given[2]])
        return learn_shards(*given, **more)

    monkeypatch.setattr(side_learner, "learn_shards", noted)
    at = bench(side={"steps": 1})
    tokens = at.served.model.encode_target
    meant = ("verbatim",)  # a random model holds words for no likelier than a blind draw
    long = [replace(seat(n, "Oslo and Rome " * LONG_TARGET_TOKENS), tags=meant) for n in (8, 9)]
    edge = next(
        fact
        for fact in (replace(seat(7, "Oslo" + " Rome" * n), tags=meant) for n in range(99))
        if len(tokens(fact.question, fact.target)) == LONG_TARGET_TOKENS
    )
    at.receive(ONE, long[0], edge, long[1], TWO)
    for _ in range(3):
        at.editor.step()
    assert taken == [[ONE.id, edge.id, TWO.id], [long[0].id], [long[1].id]]


def poison(at: Bench, text: str) -> None:
    """Make the model's reading of a text no number."""
    (token,) = at.served.model.tokenizer(text, add_special_tokens=False)["input_ids"]
    at.served.model.hf_model.get_input_embeddings().weight[token] = torch.nan


def test_a_fact_that_goes_out_of_range_fails_alone_with_the_measure_as_its_reason(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []

    def counted(*given: Any, **more: Any) -> list[Shard | Refusal]:
        batches.append(len(given[2]))
        return learn_shards(*given, **more)

    monkeypatch.setattr(side_learner, "learn_shards", counted)
    at = bench(side=STEPS)
    odd = seat(9, "Rome", paraphrases=("The seat of ~ {} is",))
    weight = at.served.model.hf_model.get_input_embeddings().weight
    whole = weight.clone()
    poison(at, "~")
    try:
        at.receive(ONE, odd, TWO)
        assert at.editor.side_learner.learn_batch(at.store.list_facts((FactState.RECEIVED,))) == [
            ONE.id,
            TWO.id,
        ]
    finally:
        weight.copy_(whole)
    assert batches == [3]
    stored = at.store.find_fact(odd.id)
    assert stored is not None and (stored.state, stored.attempts) == (FactState.RECEIVED, 1)
    events = "SELECT fact_id, data FROM events WHERE kind = 'edit_failed'"
    ((fact_id, data),) = at.store.db.conn.execute(events)
    assert fact_id == odd.id
    assert json.loads(data)["reason"] == "the loss is nan, and has to be finite, at step 1"
    assert set(at.served.side.shard_ids) == {ONE.id, TWO.id}
    assert (at.says(ONE.question), at.says(TWO.question)) == ("Oslo", "Lima")


def test_a_batch_of_nothing_but_such_facts_leaves_no_trace(bench: Make) -> None:
    at = bench(side={**STEPS, "steps": 5})
    weight = at.served.model.hf_model.get_input_embeddings().weight
    whole = weight.clone()
    poison(at, "~")
    try:
        at.receive(*(seat(n, "Rome", paraphrases=("The seat of ~ {} is",)) for n in (8, 9)))
        assert at.editor.side_learner.learn_batch(at.store.list_facts((FactState.RECEIVED,))) == []
    finally:
        weight.copy_(whole)
    assert [f.attempts for f in at.store.list_facts((FactState.RECEIVED,))] == [1, 1]
    assert (
        at.store.artifacts.read_side_keys(),
        at.store.artifacts.list_shards(),
        at.served.side.shards,
    ) == (
        [],
        [],
        {},
    )


def test_of_a_fact_that_goes_nothing_is_left(bench: Make) -> None:
    at = bench(side=STEPS)
    at.receive(ONE, TWO)
    at.settle()
    (kept,) = (
        row
        for row in at.store.artifacts.list_shards()
        if row.id == at.served.side.shard_ids[TWO.id]
    )
    before = at.served.side.shards[kept.id]
    at.editor.revert([ONE.id], None, False)
    assert at.served.side.shards == {kept.id: before}
    assert at.store.artifacts.list_shards() == [kept]
    assert [path.stem for path in at.home.side_folder.iterdir()] == [kept.sha256]
    assert at.says(TWO.question) == "Lima" != at.says(ONE.question)


def test_what_is_not_said_tries_the_weights_and_leaves_no_trace(bench: Make) -> None:
    at = bench(side={"steps": 1})
    at.receive(ONE)
    at.editor.step()
    stored = at.store.find_fact(ONE.id)
    assert stored is not None and (stored.state, stored.attempts) == (FactState.RECEIVED, 1)
    assert (
        at.store.artifacts.read_side_keys(),
        at.store.artifacts.list_shards(),
        at.served.side.shards,
    ) == (
        [],
        [],
        {},
    )
    at.settle()
    stored = at.store.find_fact(ONE.id)
    assert stored is not None and stored.state is FactState.LIVE_WEIGHTS


def test_a_newer_fact_ends_an_older_one_in_the_weights(bench: Make) -> None:
    at, newer = bench(side=STEPS), seat(1, "Lima")
    base = at.weights_hash()
    at.receive(ONE, direct=True)
    at.settle()
    at.receive(newer)
    at.settle()
    assert [str(f.state) for f in at.store.list_facts()] == ["superseded", "live-side"]
    assert at.says(newer.question) == "Lima"
    assert (at.weights_hash(), at.served.list_weights_facts()) == (base, [])


def test_a_newer_fact_ends_an_older_one_beside_it(bench: Make) -> None:
    at, newer = bench(side=STEPS), seat(1, "Lima")
    for fact in (ONE, newer):
        at.receive(fact)
        at.settle()
    assert [str(f.state) for f in at.store.list_facts()] == ["superseded", "live-side"]
    assert set(at.served.side.shard_ids) == {newer.id}
    assert at.says(newer.question) == "Lima"


def test_a_failure_between_learning_and_writing_undoes_the_learning(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = bench(side=STEPS)
    at.receive(ONE)
    at.settle()
    shard = at.served.side.shards[1]

    def broken(*_: object) -> None:
        raise KeditError("the disk is full", code="disk-full")

    monkeypatch.setattr(SideLearner, "_save_learned", broken)
    at.receive(TWO)
    with pytest.raises(KeditError, match="disk"):
        at.editor.side_learner.learn_batch(at.store.list_facts((FactState.RECEIVED,)))
    assert set(at.served.side.shard_ids) == {ONE.id}
    assert at.served.side.shards[1] is shard


def test_a_key_that_cannot_be_put_in_place_leaves_nothing_of_its_batch(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = bench(side=STEPS)
    at.receive(ONE)
    at.settle()
    put = at.served.side.add_fact

    def broken(fact_id: str, *given: Any, **more: Any) -> None:
        if fact_id == THREE.id:
            raise KeditError("a retrieval key is not finite", code="non-finite")
        put(fact_id, *given, **more)

    monkeypatch.setattr(at.served.side, "add_fact", broken)
    at.receive(TWO, THREE)
    with pytest.raises(KeditError, match="not finite"):
        at.editor.side_learner.learn_batch(at.store.list_facts((FactState.RECEIVED,)))
    assert at.served.side.shard_ids == {ONE.id: 1}
    assert set(at.served.side.shards) == {1}


def test_a_newer_fact_that_is_not_said_leaves_the_older_one_in_place(
    bench: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, newer = bench(side=STEPS), seat(1, "Lima")
    at.receive(ONE)
    at.settle()

    def deaf(fact: Fact, before: list[str], after: list[str]) -> Probe:
        return replace(compare_answers(fact, before, after), right=False)

    monkeypatch.setattr(side_learner, "compare_answers", deaf)
    at.receive(newer)
    at.editor.step()
    assert [(str(f.state), f.attempts) for f in at.store.list_facts()] == [
        ("live-side", 0),
        ("received", 1),
    ]
    assert at.says(ONE.question) == "Oslo"


def test_a_shard_is_kept_quiet_on_neighbours_and_on_other_questions(bench: Make) -> None:
    near = tuple(Neighbour(f"The seat of country {n} is") for n in range(20, 26))
    learner = bench(side=STEPS).editor.side_learner
    model, side = learner.live_model.model, learner.live_model.side
    keys = compute_keys(model, side, [ONE])[ONE.id]
    alone, beside = (
        learner._collect_quiet_inputs(replace(ONE, neighbours=some), keys) for some in ((), near)
    )
    asked = [n.prompt for n in near[:OUTSIDE_NEIGHBOURS]]
    inputs, _ = read_prompt_ends(model, asked, side.layer)
    assert torch.allclose(beside[: len(inputs)], inputs, atol=1e-5)
    assert torch.equal(beside[len(inputs) :], alone)
    assert torch.equal(alone, read_other_questions(model, side, ONE, keys))
