"""A text read at once says of each token what a prompt that ends before it would have said."""

from dataclasses import replace

import pytest
import torch
from side_tools import FIRST, ONE, SECOND, TWO, side_of
from torch import Tensor

from memory.model.editable import EditableModel
from memory.side.row_overlay import RowOverlay
from memory.side.side_memory import SideMemory
from memory.side.text_overlay import TextOverlay


@pytest.fixture
def side(model: EditableModel) -> SideMemory:
    made = side_of(model, {ONE: FIRST, TWO: SECOND})
    made.targets = {ONE: "Rome", TWO: "Oslo is it"}
    return made


def read_at_once(side: SideMemory, ids: list[int]) -> tuple[Tensor, list[tuple[int, str]]]:
    overlay = TextOverlay(side)
    with torch.no_grad(), overlay.follow_pass(ids):
        logits = side.model.hf_model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits, [(place, match.fact_id) for place, match in overlay.fired]


def read_stepwise(side: SideMemory, prompt: list[int], rest: list[int]) -> Tensor:
    """Next-token logits behind a prompt and behind each further token, as they are served."""
    overlay, logits, cache = RowOverlay(side), [], None
    with torch.no_grad(), overlay.follow_passes():
        for ids in ([prompt], *([[token]] for token in rest)):
            out = side.model.hf_model(
                input_ids=torch.tensor(ids), past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            logits.append(out.logits[0, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("tail", ["", " Rome", " Rome is it far away", " Lima is it"])
def test_a_text_is_as_if_it_had_been_said(side: SideMemory, tail: str) -> None:
    prompt = side.model.encode(FIRST)
    rest = side.model.encode(FIRST + tail)[len(prompt) :]
    logits, fired = read_at_once(side, [*prompt, *rest])
    assert fired[0] == (len(prompt) - 1, ONE)
    served = read_stepwise(side, prompt, rest)
    assert torch.allclose(logits[len(prompt) - 1 :], served, atol=1e-4)
    with torch.no_grad():
        plain = side.model.hf_model(input_ids=torch.tensor([prompt])).logits[0]
    assert torch.allclose(logits[: len(prompt) - 1], plain[:-1], atol=1e-5)
    assert not torch.allclose(logits[len(prompt) - 1], plain[-1], atol=1e-2)


def test_one_fact_fires_behind_another(side: SideMemory) -> None:
    # Keys of the second prompt are of the text that it stands in.
    side.gates = replace(side.gates, min_end_cosine=0.9, min_unnamed_cosine=0.9)
    ids = side.model.encode(f"{FIRST} Rome. {SECOND} Oslo")
    _, fired = read_at_once(side, ids)
    places = [place for place, _ in fired]
    assert fired[0] == (len(side.model.encode(FIRST)) - 1, ONE)
    assert places == sorted(set(places))


def test_a_text_that_names_nothing_is_unchanged_bit_for_bit(side: SideMemory) -> None:
    ids = side.model.encode("Quito is not far away")
    logits, fired = read_at_once(side, ids)
    with torch.no_grad():
        plain = side.model.hf_model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    assert fired == [] and torch.equal(logits, plain)


def test_a_text_without_names_is_not_tapped(model: EditableModel) -> None:
    side = side_of(model, {})
    side.shards, side.shard_ids = {}, {}
    overlay, taps = TextOverlay(side), []
    model.tap_layers = taps.append  # type: ignore[assignment,method-assign]
    with overlay.follow_pass(model.encode("Quito is not far away")):
        pass
    assert taps == []
