from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from side_tools import (
    FIRST,
    KEY,
    LAYER,
    ONE,
    PROMPTS,
    SECOND,
    TWO,
    delta_of,
    keys_of,
    read,
    side_of,
)
from torch import Tensor

from memory.errors import KeditError
from memory.model.editable import EditableModel
from memory.model.generate import generate_answers
from memory.side.index import KeyIndex, to_fact_id, to_fact_number
from memory.side.row_overlay import RowOverlay
from memory.side.shards import RetrievalKeys, RoutingGates, RoutingMatch, Shard
from memory.side.side_memory import SideMemory

LONGER = f"{FIRST} Rome. It is"  # names the subject of FIRST, and asks something else


def gate(side: SideMemory, **changes: float) -> None:
    least = {f"min_{name}_cosine": cosine for name, cosine in changes.items()}
    side.gates = replace(side.gates, **least)  # type: ignore[arg-type]


def looked(side: SideMemory, prompt: str) -> list[str]:
    return side.find_candidates(side.model.encode(prompt), read(side.model, prompt)[0])


def match_of(side: SideMemory, prompt: str) -> RoutingMatch | None:
    reading = side.read_prompt(side.model.encode(prompt))
    found = side.route_row(reading, *read(side.model, prompt))
    return found[0] if found else None


def fired(side: SideMemory, prompt: str) -> str | None:
    match = match_of(side, prompt)
    return match.fact_id if match else None


def said(side: SideMemory, prompts: list[str], rows: RowOverlay) -> list[str]:
    return generate_answers(side.model, prompts, 6, lambda _places: rows.follow_passes())


def batch(model: EditableModel, prompts: list[str]) -> Tensor:
    return torch.tensor([model.encode(prompt) for prompt in prompts])


def test_ids_and_numbers_are_one_another() -> None:
    for fact_id in (ONE, TWO, "00a1b2c3d4e5"):
        assert to_fact_id(to_fact_number(fact_id)) == fact_id
    assert to_fact_number(TWO) < 2**63


def test_keys_are_centred_at_their_layer_and_of_unit_length(model: EditableModel) -> None:
    side = side_of(model, {})
    for layer in (KEY, LAYER):
        centre = side.centres[layer]
        keys = side.compute_keys(
            layer, torch.stack([centre + torch.ones(model.hidden_size), centre * 3])
        )
        assert torch.allclose(keys.norm(dim=1), torch.ones(2))
        assert torch.allclose(
            keys[0] * model.hidden_size**0.5, torch.ones(model.hidden_size), atol=1e-5
        )


@pytest.mark.parametrize("key_layer", [LAYER, LAYER + 1])
def test_a_key_layer_that_is_not_below_the_side_layer_is_refused(
    model: EditableModel, key_layer: int
) -> None:
    centres = {n: torch.zeros(model.hidden_size) for n in range(model.layer_count)}
    with pytest.raises(KeditError, match="not below") as caught:
        SideMemory(model, RoutingGates(key_layer, LAYER, 0.9, 0.9, 0.9), centres)
    assert (caught.value.code, caught.value.exit_code) == ("unsupported", 78)


def test_a_fact_fires_at_its_prompt_alone(model: EditableModel) -> None:
    side = side_of(model, {ONE: FIRST, TWO: SECOND})
    assert [fired(side, p) for p in PROMPTS] == [ONE, TWO, None]
    match = match_of(side, SECOND)
    _, inputs, _ = read(model, SECOND)
    delta = side.shards[2].delta
    distance = float((delta.up @ delta.down @ inputs).norm())
    assert match is not None
    assert (match.shard_id, match.score) == (2, pytest.approx(1, abs=1e-5))
    assert match.margin == pytest.approx(distance / 1e-3, rel=1e-5)


def test_a_subject_is_looked_for_at_every_token(model: EditableModel) -> None:
    side = side_of(model, {ONE: FIRST, TWO: SECOND})
    assert looked(side, FIRST) == [ONE]
    assert looked(side, LONGER) == [ONE]
    assert looked(side, PROMPTS[2]) == []
    assert fired(side, LONGER) is None
    gate(side, end=-1.0)
    assert fired(side, LONGER) == ONE


def test_the_subject_gate_alone_may_say_no(model: EditableModel) -> None:
    side = side_of(model, {ONE: FIRST}, end=-1.0)
    side.add_fact(
        ONE, 1, keys_of(side, FIRST), ("seat of",), unnamed=False
    )  # both prompts name that
    key = side.compute_keys(KEY, read(model, SECOND)[0]) @ keys_of(side, FIRST).subject[0]
    gate(side, subject=float(key.max()) - 1e-3)
    assert fired(side, SECOND) == ONE
    gate(side, subject=float(key.max()) + 1e-3)
    assert fired(side, SECOND) is None


def test_a_named_fact_fires_where_its_subject_is_named_and_nowhere_else(
    model: EditableModel,
) -> None:
    side = side_of(model, {ONE: FIRST}, subject=-1.0, end=-1.0)
    assert [fired(side, p) for p in PROMPTS] == [ONE, ONE, ONE]
    side.add_fact(ONE, 1, keys_of(side, FIRST), ("Country 11",), unnamed=False)
    assert [fired(side, p) for p in (*PROMPTS, LONGER)] == [ONE, None, None, ONE]
    assert fired(side, "It rained. THE SEAT OF COUNTRY 11, is") == ONE
    gate(side, unnamed=1.1)  # not asked of it
    assert fired(side, FIRST) == ONE
    gate(side, subject=1.1)
    assert fired(side, FIRST) is None


def test_facts_on_one_subject_do_not_crowd_one_another_out(model: EditableModel) -> None:
    side = side_of(model, {}, subject=0.999, end=-1.0)
    ids = [f"{n:012x}" for n in range(1, 41)]
    for fact_id in ids:
        side.add_fact(fact_id, 1, keys_of(side, FIRST), ("country 11",), unnamed=False)
    assert sorted(looked(side, FIRST)) == ids


def test_a_fact_with_an_unnamed_prompt_has_the_gate_of_names_where_it_is_named(
    model: EditableModel,
) -> None:
    side = side_of(model, {ONE: FIRST}, subject=-1.0, end=-1.0)
    side.add_fact(ONE, 1, keys_of(side, FIRST), ("country 11",), unnamed=True)
    gate(side, unnamed=1.1)
    assert [fired(side, p) for p in (FIRST, SECOND)] == [ONE, None]
    gate(side, unnamed=-1.0)
    assert [fired(side, p) for p in (FIRST, SECOND)] == [ONE, ONE]


def searches(side: SideMemory, monkeypatch: pytest.MonkeyPatch) -> list[KeyIndex]:
    """Gets the index that is asked for keys, each time from now on."""
    found: list[KeyIndex] = []

    def counting(ask: Callable[..., list[int]]) -> Callable[..., list[int]]:
        def counted(index: KeyIndex, first: Any, *given: Any) -> list[int]:
            if len(index) and len(first):
                found.append(index)
            return ask(index, first, *given)

        return counted

    for ask in (KeyIndex.find_near, KeyIndex.filter_near):
        monkeypatch.setattr(KeyIndex, ask.__name__, counting(ask))
    return found


def test_a_prompt_that_names_no_subject_is_not_looked_up(
    model: EditableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = side_of(model, {ONE: FIRST, TWO: SECOND}, subject=-1.0, end=-1.0)
    for fact_id, prompt in ((ONE, FIRST), (TWO, SECOND)):
        side.add_fact(fact_id, 1, keys_of(side, prompt), (prompt[-13:-3],), unnamed=False)
    found = searches(side, monkeypatch)
    assert [fired(side, p) for p in PROMPTS] == [ONE, TWO, None]
    assert found == [side.key_index] * 2
    side.add_fact(TWO, 1, keys_of(side, SECOND), (), unnamed=True)
    assert fired(side, PROMPTS[2]) == TWO
    assert len(found) == 3 and found[2] is not side.key_index and len(found[2]) == 1
    side.remove_fact(TWO)
    assert fired(side, PROMPTS[2]) is None
    assert len(found) == 3


@pytest.mark.parametrize("unnamed", [False, True])
def test_nothing_is_searched_where_something_else_is_asked(
    model: EditableModel, monkeypatch: pytest.MonkeyPatch, unnamed: bool
) -> None:
    side = side_of(model, {}, subject=-1.0)
    side.shards[1] = Shard(delta_of(model, 1), 1e-3)
    side.add_fact(ONE, 1, keys_of(side, FIRST), () if unnamed else ("country 11",), unnamed=unnamed)
    found = searches(side, monkeypatch)
    assert looked(side, LONGER) == [ONE]
    assert len(found) == 1
    assert fired(side, LONGER) is None
    assert len(found) == 1
    assert fired(side, FIRST) == ONE
    assert len(found) == 2


def test_facts_that_need_not_be_named_come_and_go(model: EditableModel) -> None:
    side = side_of(model, {ONE: FIRST})
    assert [fired(side, p) for p in PROMPTS] == [ONE, None, None]
    side.add_fact(TWO, 1, keys_of(side, SECOND), (), unnamed=True)
    assert [fired(side, p) for p in PROMPTS] == [ONE, TWO, None]
    side.add_fact(TWO, 1, keys_of(side, PROMPTS[2]), (), unnamed=True)
    assert [fired(side, p) for p in PROMPTS] == [ONE, None, TWO]
    side.remove_fact(ONE)
    assert [fired(side, p) for p in PROMPTS] == [None, None, TWO]


def test_facts_that_are_named_do_not_crowd_out_one_that_is_not(model: EditableModel) -> None:
    side = side_of(model, {TWO: FIRST}, end=-1.0)
    for n in range(1, 41):
        side.add_fact(f"{n:012x}", 1, keys_of(side, FIRST), (f"town {n}",), unnamed=False)
    assert looked(side, FIRST) == [TWO]
    assert fired(side, FIRST) == TWO
    side.add_fact(TWO, 1, keys_of(side, FIRST), (), unnamed=False)
    assert fired(side, FIRST) is None


def test_a_fact_that_leaves_its_subject_unnamed_has_a_gate_of_its_own(
    model: EditableModel,
) -> None:
    side = side_of(model, {ONE: FIRST}, subject=-1.0, end=-1.0)
    key = side.compute_keys(KEY, read(model, SECOND)[0]) @ keys_of(side, FIRST).subject[0]
    gate(side, unnamed=float(key.max()) - 1e-3)
    assert fired(side, SECOND) == ONE
    gate(side, unnamed=float(key.max()) + 1e-3)
    assert [fired(side, p) for p in (FIRST, SECOND)] == [ONE, None]


def test_the_end_gate_alone_may_say_no(model: EditableModel) -> None:
    side = side_of(model, {ONE: FIRST}, subject=-1.0)
    cosine = float(keys_of(side, SECOND).end[0] @ keys_of(side, FIRST).end[0])
    gate(side, end=cosine - 1e-3)
    assert fired(side, SECOND) == ONE
    gate(side, end=cosine + 1e-3)
    assert fired(side, SECOND) is None


def test_the_nearest_of_a_facts_keys_counts(model: EditableModel) -> None:
    side = side_of(model, {ONE: FIRST})
    pair = [keys_of(side, FIRST), keys_of(side, SECOND)]
    joint = RetrievalKeys(torch.cat([k.subject for k in pair]), torch.cat([k.end for k in pair]))
    side.add_fact(ONE, 1, joint, "", unnamed=True)
    assert [fired(side, p) for p in PROMPTS] == [ONE, ONE, None]


def test_of_two_facts_on_a_subject_the_one_that_is_asked_for_fires(model: EditableModel) -> None:
    side = side_of(model, {ONE: FIRST, TWO: SECOND}, subject=-1.0, end=-1.0)
    assert [fired(side, p) for p in PROMPTS[:2]] == [ONE, TWO]


def test_the_distance_alone_may_say_no(model: EditableModel) -> None:
    side = side_of(model, {ONE: FIRST})
    delta = side.shards[1].delta
    distance = float((delta.up @ delta.down @ read(model, FIRST)[1]).norm())
    side.shards[1] = Shard(delta, distance * 0.999)
    assert fired(side, FIRST) == ONE
    side.shards[1] = Shard(delta, distance * 1.001)
    assert fired(side, FIRST) is None


def test_a_fact_whose_shard_says_no_leaves_room_for_the_next(model: EditableModel) -> None:
    side = side_of(model, {ONE: FIRST, TWO: FIRST})
    side.shards[1] = Shard(side.shards[1].delta, 1e9)
    assert fired(side, FIRST) == TWO


def test_a_dropped_fact_never_fires(model: EditableModel) -> None:
    side = side_of(model, {ONE: FIRST, TWO: SECOND})
    side.remove_fact(ONE)
    side.remove_fact(ONE)
    assert [fired(side, p) for p in PROMPTS] == [None, TWO, None]
    side.remove_fact(TWO)
    assert [fired(side, p) for p in PROMPTS] == [None, None, None]
    assert len(side.key_index) == 0


def test_a_hidden_fact_does_not_fire_while_it_is_hidden(model: EditableModel) -> None:
    side = side_of(model, {ONE: FIRST, TWO: FIRST})
    side.hidden_facts = {ONE}
    assert fired(side, FIRST) == TWO
    side.hidden_facts = {ONE, TWO}
    assert fired(side, FIRST) is None
    rows = RowOverlay(side)
    assert said(side, [FIRST], rows) == generate_answers(model, [FIRST], 6)
    side.hidden_facts = set()
    assert fired(side, FIRST) in (ONE, TWO)


def test_a_fact_that_is_put_again_has_its_new_keys_alone(model: EditableModel) -> None:
    side = side_of(model, {ONE: FIRST})
    side.add_fact(ONE, 1, keys_of(side, SECOND), (), unnamed=True)
    assert [fired(side, p) for p in PROMPTS] == [None, ONE, None]
    assert len(side.key_index) == 1


def test_a_fact_whose_subject_keys_are_indexed_is_not_added_twice(model: EditableModel) -> None:
    side = side_of(model, {ONE: FIRST})
    keys = keys_of(side, FIRST)
    # As with an index that was read from its file.
    del side.shard_ids[ONE], side.end_keys[ONE]
    side.unnamed_facts.clear()
    assert fired(side, FIRST) is None
    side.add_fact(ONE, 1, keys, (), unnamed=True, indexed=True)
    assert fired(side, FIRST) == ONE
    assert len(side.key_index) == 1


def test_unrouted_rows_are_those_of_the_plain_model_bit_for_bit(model: EditableModel) -> None:
    side, ids = side_of(model, {TWO: SECOND}), batch(model, PROMPTS)
    rows = RowOverlay(side)
    with torch.no_grad():
        plain = model.hf_model(input_ids=ids, use_cache=False).logits
        with rows.follow_passes():
            routed = model.hf_model(input_ids=ids, use_cache=False).logits
        after = model.hf_model(input_ids=ids, use_cache=False).logits
    assert [m.fact_id if m else None for m in rows.matches] == [None, TWO, None]
    assert torch.equal(routed[[0, 2]], plain[[0, 2]])
    assert torch.equal(routed[1, :-1], plain[1, :-1])
    assert not torch.allclose(routed[1, -1], plain[1, -1], atol=1e-3)
    assert torch.equal(after, plain)


def test_a_routed_token_is_computed_with_the_shards_weights(model: EditableModel) -> None:
    side, ids = side_of(model, {TWO: SECOND}), batch(model, [SECOND])
    with torch.no_grad():
        with RowOverlay(side).follow_passes():
            routed = model.hf_model(input_ids=ids, use_cache=False).logits[0, -1]
        # The same sum, had the last token alone seen W0 + ΔW.
        prefix = model.hf_model(input_ids=ids[:, :-1], use_cache=True)
        delta = side.shards[1].delta
        model.set_deltas({LAYER: delta.up @ delta.down})
        last = model.hf_model(input_ids=ids[:, -1:], past_key_values=prefix.past_key_values)
    assert torch.allclose(routed, last.logits[0, -1], atol=1e-4)


def test_the_decision_is_taken_once_and_holds_while_decoding(model: EditableModel) -> None:
    side, ids = side_of(model, {TWO: SECOND}), batch(model, PROMPTS)
    next_token = torch.tensor([[5], [6], [7]])
    rows = RowOverlay(side)
    with torch.no_grad():
        out = model.hf_model(input_ids=ids, use_cache=True)
        plain = model.hf_model(input_ids=next_token, past_key_values=out.past_key_values).logits
        with rows.follow_passes():
            out = model.hf_model(input_ids=ids, use_cache=True)
            decided = rows.matches
            gate(side, subject=2.0, end=2.0)  # a second look would route nothing
            step = model.hf_model(input_ids=next_token, past_key_values=out.past_key_values).logits
    assert rows.matches == decided
    assert torch.equal(step[[0, 2]], plain[[0, 2]])
    assert not torch.allclose(step[1], plain[1], atol=1e-3)


def test_a_row_that_was_not_routed_at_its_prompts_end_never_is(model: EditableModel) -> None:
    side, ids = side_of(model, {TWO: SECOND}), batch(model, [PROMPTS[2]])
    rows = RowOverlay(side)
    with torch.no_grad():
        out = model.hf_model(input_ids=ids, use_cache=True)
        plain = model.hf_model(input_ids=torch.tensor([[5]]), past_key_values=out.past_key_values)
        with rows.follow_passes():
            out = model.hf_model(input_ids=ids, use_cache=True)
            gate(side, subject=-1.0, end=-1.0)  # a second look would route everything
            step = model.hf_model(
                input_ids=torch.tensor([[5]]), past_key_values=out.past_key_values
            )
    assert rows.matches == [None]
    assert torch.equal(step.logits, plain.logits)


def hooks(model: EditableModel) -> int:
    modules = list(model.hf_model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


@pytest.mark.parametrize(
    ("prompt", "subject", "unnamed", "left"),
    [
        (FIRST, "country 12", False, 0),
        (LONGER, "country 11", False, 0),
        (LONGER, "", True, 0),
        (FIRST, "country 11", False, 1),
    ],
)
def test_where_no_row_is_routed_a_token_goes_through_the_model_alone(
    model: EditableModel, prompt: str, subject: str, unnamed: bool, left: int
) -> None:
    side = side_of(model, {ONE: FIRST})
    side.add_fact(ONE, 1, keys_of(side, FIRST), (subject,), unnamed=unnamed)
    match_of(side, prompt)  # the model's first tap has hooks of its own
    rows = RowOverlay(side)
    with torch.no_grad(), rows.follow_passes():
        model.hf_model(input_ids=batch(model, [prompt]))
        assert [bool(m) for m in rows.matches] == [bool(left)]
        model.hf_model(input_ids=torch.tensor([[5]]))
        assert (hooks(model), len(rows.matches)) == (1 + left, 1)  # one hears the tokens
    assert hooks(model) == 0


def test_a_prompt_that_names_nothing_is_not_tapped_at_all(
    model: EditableModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    side = side_of(model, {ONE: FIRST})
    side.add_fact(ONE, 1, keys_of(side, FIRST), ("country 11",), unnamed=False)
    tapped: list[list[int]] = []
    tap = model.tap_layers
    monkeypatch.setattr(model, "tap_layers", lambda taps: tapped.append(list(taps)) or tap(taps))
    rows = RowOverlay(side)
    assert said(side, PROMPTS[1:], rows) == generate_answers(model, PROMPTS[1:], 6)
    assert (tapped, rows.matches) == ([], [None, None])
    said(side, [FIRST], rows)
    assert tapped[0] == [KEY, LAYER]
    assert all(layers == [LAYER] for layers in tapped[1:])


def test_an_overlay_begins_anew_with_each_batch(model: EditableModel) -> None:
    side = side_of(model, {TWO: SECOND})
    rows = RowOverlay(side)
    plain = generate_answers(model, PROMPTS, 6)
    assert said(side, [SECOND], rows) != plain[1:2]
    assert rows.matches[0] is not None
    assert said(side, [FIRST], rows) == plain[:1]
    assert rows.matches == [None]


def test_answers_of_unrouted_prompts_are_unchanged_among_routed_ones(
    model_folder: Callable[[str], Path],
) -> None:
    gpt2 = EditableModel.load(model_folder("gpt2"), torch.device("cpu"))
    side = side_of(gpt2, {TWO: SECOND})
    plain = generate_answers(gpt2, PROMPTS, 6)
    routed = said(side, PROMPTS, RowOverlay(side))
    assert routed[0] == plain[0]
    assert routed[1] != plain[1]
    assert routed[2] == plain[2]


def test_what_was_decided_is_laid_over_the_rows_that_follow(model: EditableModel) -> None:
    side, ids = side_of(model, {TWO: SECOND}), batch(model, PROMPTS)
    read = RowOverlay(side)
    with torch.no_grad(), read.read_prompts(ids.tolist()):
        cache = model.hf_model(input_ids=ids, use_cache=True).past_key_values
    step = torch.full((3, 1), 5)
    plain = model.hf_model(input_ids=step, past_key_values=deepcopy(cache)).logits
    side.remove_fact(TWO)
    del side.shards[1]
    with torch.no_grad(), RowOverlay(side, read.rows).apply_deltas():
        laid = model.hf_model(input_ids=step, past_key_values=cache).logits
    assert torch.equal(laid[[0, 2]], plain[[0, 2]])
    assert not torch.allclose(laid[1], plain[1], atol=1e-3)


def test_where_nothing_was_decided_nothing_is_tapped(model: EditableModel) -> None:
    overlay = RowOverlay(side_of(model, {}))
    with overlay.read_prompts([model.encode(FIRST)] * 2):
        assert hooks(model) == 0
    with overlay.apply_deltas():
        assert hooks(model) == 0
