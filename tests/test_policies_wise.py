from dataclasses import replace

import pytest
import torch
from conftest import SENTENCES, seat
from torch import Tensor
from torch.nn import functional as F

from memory.errors import KeditError
from memory.facts import Fact
from memory.generate import answers
from memory.model import EditableModel
from memory.side import Gates, SideMemory
from policies.prompts import rows_of
from policies.site import EditSite, default_site
from policies.wise import (
    ACTIVATION_RATIO,
    DONE,
    EXTRA_STEPS,
    MASK_SHARE,
    Learned,
    learn,
    mask_for,
    prompt_end,
)

FACTS = [seat(11, "Oslo"), seat(12, "Rome")]


@pytest.fixture
def site() -> EditSite:
    return replace(default_site(4), side_rate=0.5)


@pytest.fixture
def side(model: EditableModel, site: EditSite) -> SideMemory:
    layers = (site.key_layer, site.side_layer)
    centres = {n: prompt_end(model, SENTENCES[:30], n)[1].mean(0) for n in layers}
    return SideMemory(model, Gates(*layers, site.subject_gate, site.end_gate, 0.95), centres)


@pytest.fixture
def outside(model: EditableModel, site: EditSite) -> Tensor:
    prompts = [" ".join(line.split()[:3]) for line in SENTENCES[::20]]
    return prompt_end(model, prompts, site.side_layer)[0]


def learned(
    side: SideMemory,
    site: EditSite,
    facts: list[Fact],
    outside: Tensor,
    steps: int = 200,
    start: Tensor | None = None,
) -> Learned:
    scale = float(side.centres[side.layer].norm())  # near the outputs' own length
    return learn(
        side.model, side, site, facts, 1, start=start, outside=outside, scale=scale, steps=steps
    )


def lay(side: SideMemory, found: Learned) -> None:
    side.shards[1] = found.shard
    for fact_id, keys in found.keys.items():
        side.put(fact_id, 1, keys, "")


def said(side: SideMemory, facts: list[Fact]) -> list[str]:
    return answers(side.model, [f.question for f in facts], 8, lambda _places: side.overlay([]))


def test_the_prompts_end_is_read_whatever_the_company(model: EditableModel) -> None:
    prompts = ["Rome", "The seat of country 1 is", "It is"]
    inputs, outputs = prompt_end(model, prompts, 2)
    for n, prompt in enumerate(prompts):
        caught: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad(), model.tap({2: lambda k, y, to=caught: to.append((k, y))}):
            model.model(input_ids=torch.tensor([model.encode(prompt)]), use_cache=False)
        assert torch.allclose(inputs[n], caught[0][0][0, -1], atol=1e-5)
        assert torch.allclose(outputs[n], caught[0][1][0, -1], atol=1e-5)
    empty = prompt_end(model, [], 2)
    assert [t.shape for t in empty] == [(0, inputs.shape[1]), (0, outputs.shape[1])]


def test_a_shards_subspace_follows_from_its_number() -> None:
    shape, cpu = (200, 300), torch.device("cpu")
    one, other = mask_for(1, shape, cpu), mask_for(2, shape, cpu)
    torch.manual_seed(5)
    assert torch.equal(mask_for(1, shape, cpu), one)
    assert not torch.equal(one, other)
    assert float(one.float().mean()) == pytest.approx(MASK_SHARE, abs=0.01)


def test_learned_facts_are_said_under_the_overlay(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    plain = said(side, FACTS)
    found = learned(side, site, FACTS, outside)
    lay(side, found)
    assert said(side, FACTS) == ["Oslo", "Rome"] != plain
    assert set(found.keys) == {f.id for f in FACTS}


def test_facts_with_targets_of_different_length_share_a_shard(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    facts = [seat(11, "Oslo"), seat(12, "Rome and Lima")]
    lengths = {len(side.model.encode_target(f.question, f.target)) for f in facts}
    assert len(lengths) == 2
    lay(side, learned(side, site, facts, outside))
    assert said(side, facts) == ["Oslo", "Rome and Lima"]


def test_a_shard_stays_in_its_subspace(side: SideMemory, site: EditSite, outside: Tensor) -> None:
    delta = learned(side, site, FACTS, outside, steps=8).shard.delta
    mask = mask_for(1, delta.shape, delta.device)
    assert not delta[~mask].any()
    assert delta[mask].any()


def test_every_prompt_of_a_fact_reaches_the_threshold_and_little_else_does(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    shard = learned(side, site, FACTS, outside).shard
    prompts = [side.model.decode(row.prompt) for fact in FACTS for row in rows_of(side.model, fact)]
    inside, _ = prompt_end(side.model, prompts, site.side_layer)
    distance = (inside @ shard.delta.T).norm(dim=1)
    quiet = (outside @ shard.delta.T).norm(dim=1)
    assert shard.threshold == pytest.approx(ACTIVATION_RATIO * float(distance.min()), rel=1e-3)
    assert float(quiet.median()) < float(distance.min())


def routed_loss(side: SideMemory, facts: list[Fact], delta: Tensor, early: int) -> float:
    """Mean NLL of the targets, ΔW laid over all tokens from `early` before the prompt's end on."""
    model, losses = side.model, []
    for row in (row for fact in facts for row in rows_of(model, fact)):
        first = row.prompt_length - 1

        def tap(inputs: Tensor, outputs: Tensor, at: int = first - early) -> Tensor:
            routed = outputs.clone()
            routed[:, at:] += inputs[:, at:] @ delta.T
            return routed

        with torch.no_grad(), model.tap({side.layer: tap}):
            said = model.model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
        wanted = torch.tensor(row.ids[row.prompt_length :])
        losses.append(F.cross_entropy(said[first:-1], wanted, reduction="none"))
    return float(torch.cat(losses).mean())


def test_what_is_learned_is_routed_from_the_prompts_end_on(
    side: SideMemory, site: EditSite
) -> None:
    site = replace(site, alpha=1e9, beta=0, gamma=-1e9)  # the targets alone, without margins
    side.model.set_deltas({0: side.model.base_weight(0) * 0.3})
    facts = [FACTS[0], seat(12, "Rome and Lima", paraphrases=("{}:",))]
    shape = side.model.base_weight(site.side_layer).shape
    start = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    start *= mask_for(1, shape, start.device)
    loss = learned(side, site, facts, torch.empty(0, shape[1]), steps=1, start=start).loss
    assert loss == pytest.approx(routed_loss(side, facts, start, 0), abs=1e-4)
    for elsewhere in (-1, 1, 2):
        assert abs(loss - routed_loss(side, facts, start, elsewhere)) > 1e-3


def test_the_margins_keep_a_shard_quiet_elsewhere(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    loud = learned(side, replace(site, alpha=1e9, beta=0, gamma=-1e9), FACTS, outside, steps=30)
    calm = learned(side, site, FACTS, outside, steps=30)

    def contrast(found: Learned) -> float:
        prompts = [f.question for f in FACTS]
        inside, _ = prompt_end(side.model, prompts, site.side_layer)
        delta = found.shard.delta.T
        return float((inside @ delta).norm(dim=1).mean() / (outside @ delta).norm(dim=1).mean())

    assert contrast(calm) > contrast(loud)


def test_keys_are_the_centred_outputs_at_subject_and_prompts_end(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    facts = [FACTS[0], seat(12, "Rome", paraphrases=("Where {} is ruled from:",))]
    found = learned(side, site, facts, outside, steps=1).keys
    for fact in facts:
        rows = rows_of(side.model, fact)
        prompts = [side.model.decode(row.prompt) for row in rows]
        cut = [p[: p.rindex(fact.subject) + len(fact.subject)] for p in prompts]
        _, subject = prompt_end(side.model, cut, site.key_layer)
        _, end = prompt_end(side.model, prompts, site.side_layer)
        keys = found[fact.id]
        assert torch.allclose(keys.subject, side.key(site.key_layer, subject), atol=1e-4)
        assert torch.allclose(keys.end, side.key(site.side_layer, end), atol=1e-4)


def test_learning_reads_the_weights_as_served_and_leaves_them_alone(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    model, low = side.model, site.key_layer
    clean = learned(side, site, FACTS, outside, steps=3)
    model.set_deltas({low: model.base_weight(low) * 0.5})
    edited = model.weights_hash(range(4))
    again = learned(side, site, FACTS, outside, steps=3)
    assert model.weights_hash(range(4)) == edited
    assert not torch.allclose(again.shard.delta, clean.shard.delta, atol=1e-3)
    for fact in FACTS:
        _, end = prompt_end(model, [fact.question], site.side_layer)
        keys = again.keys[fact.id].end
        assert torch.allclose(keys[0], side.key(site.side_layer, end)[0], atol=1e-4)
        assert not torch.allclose(keys, clean.keys[fact.id].end, atol=1e-3)


def test_facts_are_said_on_edited_weights(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    side.model.set_deltas({n: side.model.base_weight(n) * 0.3 for n in (0, site.side_layer)})
    lay(side, learned(side, site, FACTS, outside))
    assert said(side, FACTS) == ["Oslo", "Rome"]


def test_training_ends_when_there_is_nothing_left_to_learn(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    site = replace(site, alpha=1e9, beta=0, gamma=-1e9)  # a random model misses the margins,
    side.model.model.get_output_embeddings().weight.mul_(10)  # and is sure of nothing
    first = learned(side, site, FACTS[:1], outside)
    assert first.steps < 200
    assert first.loss < DONE
    again = learned(side, site, FACTS[:1], outside, start=first.shard.delta)
    assert again.steps == EXTRA_STEPS + 1


def test_a_shard_goes_on_from_what_it_knows(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    first = learned(side, site, FACTS[:1], outside)
    assert learned(side, site, FACTS[:1], outside, 1, first.shard.delta).loss < 1.5 * first.loss
    grown = learned(side, site, FACTS, outside, start=first.shard.delta)
    lay(side, grown)
    assert said(side, FACTS) == ["Oslo", "Rome"]


def test_a_pulse_is_felt_at_every_step(side: SideMemory, site: EditSite, outside: Tensor) -> None:
    felt: list[int] = []
    learn(
        side.model,
        side,
        site,
        FACTS,
        1,
        start=None,
        outside=outside,
        scale=1.0,
        steps=4,
        pulse=felt.append,
    )
    assert felt == [1, 2, 3, 4]


def test_a_loss_that_is_no_number_is_refused(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    start = torch.full_like(side.model.base_weight(site.side_layer), torch.nan)
    before = side.model.weights_hash(range(4))
    with pytest.raises(KeditError) as caught:
        learned(side, site, FACTS, outside, start=start)
    assert caught.value.code == "non-finite"
    assert side.model.weights_hash(range(4)) == before


def test_a_fact_that_the_model_cannot_read_is_refused(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    with pytest.raises(KeditError) as caught:
        learned(side, site, [Fact("x", "{} is", "Rome " * 300)], outside)
    assert caught.value.code == "rejected"


def test_nothing_outside_is_no_obstacle(side: SideMemory, site: EditSite) -> None:
    width = side.model.weight(site.side_layer).shape[1]
    found = learned(side, site, FACTS, torch.empty(0, width))
    lay(side, found)
    assert said(side, FACTS) == ["Oslo", "Rome"]
