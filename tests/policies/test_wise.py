from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from editing_home import seat
from tiny_models import SENTENCES
from torch import Tensor
from torch.nn import functional as F

from memory.errors import KeditError
from memory.facts import Fact
from memory.model.editable import EditableModel
from memory.model.generate import generate_answers
from memory.side.row_overlay import RowOverlay
from memory.side.shards import THRESHOLD_RATIO, Delta, RoutingGates, Shard
from memory.side.side_memory import SideMemory
from policies import wise
from policies.divergence import MAX_OUTPUT_SHIFT, DivergenceWatch, StepReadings
from policies.edit_site import EditSite, make_default_site
from policies.edit_terms import Refusal
from policies.prompts import SUBJECT_QUESTIONS, make_rows
from policies.wise import (
    DONE_LOSS,
    EXTRA_STEPS,
    SHARD_RANK,
    compute_keys,
    learn_shards,
    read_other_questions,
    read_prompt_ends,
)

FACTS = [seat(11, "Oslo"), seat(12, "Rome")]


@pytest.fixture
def site() -> EditSite:
    return replace(make_default_site(4), side_rate=0.5)


@pytest.fixture
def side(model: EditableModel, site: EditSite) -> SideMemory:
    layers = (site.key_layer, site.side_layer)
    centres = {n: read_prompt_ends(model, SENTENCES[:30], n)[1].mean(0) for n in layers}
    return SideMemory(model, RoutingGates(*layers, site.subject_gate, site.end_gate, 0.95), centres)


@pytest.fixture
def outside(model: EditableModel, site: EditSite) -> Tensor:
    prompts = [" ".join(line.split()[:3]) for line in SENTENCES[::20]]
    return read_prompt_ends(model, prompts, site.side_layer)[0]


def scale_of(side: SideMemory) -> float:
    return float(side.centres[side.layer].norm())  # near the outputs' own length


def tried(
    side: SideMemory,
    site: EditSite,
    facts: list[Fact],
    outside: Tensor,
    steps: int = 200,
    others: list[Tensor] | None = None,
    pulse: Callable[[int], None] = lambda _step: None,
) -> list[Shard | Refusal]:
    return learn_shards(
        side.model,
        site,
        facts,
        outside=outside,
        others=[outside[:0]] * len(facts) if others is None else others,
        scale=scale_of(side),
        steps=steps,
        pulse=pulse,
    )


def learned(*given: Any, **more: Any) -> list[Shard]:
    found = tried(*given, **more)
    shards = [one for one in found if isinstance(one, Shard)]
    assert len(shards) == len(found)
    return shards


def lay(side: SideMemory, found: list[Shard], facts: list[Fact]) -> None:
    keys = compute_keys(side.model, side, facts)
    for number, (fact, shard) in enumerate(zip(facts, found, strict=True)):
        side.shards[number] = shard
        side.add_fact(fact.id, number, keys[fact.id], (), unnamed=True)


def prompts_of(side: SideMemory, facts: list[Fact]) -> list[str]:
    """As they are learned, contexts and all."""
    model = side.model
    return [model.decode(row.prompt) for fact in facts for row in make_rows(model, fact)]


def said(side: SideMemory, facts: list[Fact]) -> list[str]:
    return generate_answers(
        side.model, [f.question for f in facts], 8, lambda _places: RowOverlay(side).follow_passes()
    )


def test_the_prompts_end_is_read_whatever_the_company(model: EditableModel) -> None:
    prompts = ["Rome", "The seat of country 1 is", "It is"]
    inputs, outputs = read_prompt_ends(model, prompts, 2)
    for n, prompt in enumerate(prompts):
        caught: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad(), model.tap_layers({2: lambda k, y, to=caught: to.append((k, y))}):
            model.hf_model(input_ids=torch.tensor([model.encode(prompt)]), use_cache=False)
        assert torch.allclose(inputs[n], caught[0][0][0, -1], atol=1e-5)
        assert torch.allclose(outputs[n], caught[0][1][0, -1], atol=1e-5)
    empty = read_prompt_ends(model, [], 2)
    assert [t.shape for t in empty] == [(0, inputs.shape[1]), (0, outputs.shape[1])]


def test_a_shards_beginning_follows_from_its_fact(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    still = replace(site, side_rate=0.0)
    one, again = (learned(side, still, FACTS, outside, steps=1) for _ in range(2))
    for shard, same in zip(one, again, strict=True):
        assert torch.equal(shard.delta.down, same.delta.down)
    # Another target makes another fact of the same prompts.
    (other,) = learned(side, still, [seat(11, "Lima")], outside, steps=1)
    spread = float(one[0].delta.down.std())
    assert not torch.allclose(one[0].delta.down, other.delta.down, atol=0.1 * spread)


def test_a_shard_begins_as_nothing_that_sees_its_fact_and_little_else(
    side: SideMemory, site: EditSite, outside: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wise, "DOWN_RATE", 0.0)
    still = replace(site, side_rate=0.0)
    others, _ = read_prompt_ends(side.model, ["The river of country 11 is", "He"], site.side_layer)
    found = learned(side, still, FACTS, outside, 1, [others, others[:1]])
    for fact, shard, own in zip(FACTS, found, (others, others[:1]), strict=True):
        inside, _ = read_prompt_ends(side.model, prompts_of(side, [fact]), site.side_layer)
        assert not shard.delta.apply_to(inside).any()
        seen, quiet, near = (
            float((k @ shard.delta.down.T).norm(dim=1).mean()) for k in (inside, outside, own)
        )
        assert seen == pytest.approx(1, rel=1e-3)
        assert quiet < 0.05
        assert near < 0.5


def test_what_is_learned_together_is_what_is_learned_alone(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    facts = [*FACTS, seat(13, "Rome and Lima", paraphrases=("{}:",))]
    prompts = ["The river of country 11 is", "He", "In the long run the river"]
    quiet, _ = read_prompt_ends(side.model, prompts, site.side_layer)
    others = [quiet[:1], quiet, quiet[1:]]
    together = learned(side, site, facts, outside, 6, others)
    for n, fact in enumerate(facts):
        (alone,) = learned(side, site, [fact], outside, 6, others[n : n + 1])
        for one, other in zip(
            vars(alone.delta).values(), vars(together[n].delta).values(), strict=True
        ):
            assert torch.allclose(one, other, atol=0.02 * float(other.abs().max()))
        assert alone.threshold == pytest.approx(together[n].threshold, rel=0.02)


def test_learned_facts_are_said_under_the_overlay(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    plain = said(side, FACTS)
    lay(side, learned(side, site, FACTS, outside), FACTS)
    assert said(side, FACTS) == ["Oslo", "Rome"] != plain


def test_facts_with_targets_of_different_length_are_learned_together(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    facts = [seat(11, "Oslo"), seat(12, "Rome and Lima")]
    lengths = {len(side.model.encode_target(f.question, f.target)) for f in facts}
    assert len(lengths) == 2
    lay(side, learned(side, site, facts, outside), facts)
    assert said(side, facts) == ["Oslo", "Rome and Lima"]


def test_a_shard_is_of_small_rank(side: SideMemory, site: EditSite, outside: Tensor) -> None:
    hidden, width = side.model.base_weight(site.side_layer).shape
    assert hidden > SHARD_RANK
    for shard in learned(side, site, FACTS, outside, steps=8):
        delta = shard.delta
        assert (delta.up.shape, delta.down.shape) == ((hidden, SHARD_RANK), (SHARD_RANK, width))
        assert not delta.up.requires_grad and not delta.down.requires_grad
        for part in (delta.up, delta.down):  # it does not keep those of the other facts
            assert part.untyped_storage().nbytes() == part.numel() * part.element_size()


def test_every_prompt_of_a_fact_reaches_the_threshold_and_little_else_does(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    for fact, shard in zip(FACTS, learned(side, site, FACTS, outside), strict=True):
        inside, _ = read_prompt_ends(side.model, prompts_of(side, [fact]), site.side_layer)
        distance = shard.delta.apply_to(inside).norm(dim=1)
        quiet = shard.delta.apply_to(outside).norm(dim=1)
        assert shard.threshold == pytest.approx(THRESHOLD_RATIO * float(distance.min()), rel=1e-3)
        assert float(quiet.median()) < float(distance.min())


def routed_loss(side: SideMemory, fact: Fact, delta: Delta, early: int) -> float:
    """Mean NLL of the target, ΔW laid over all tokens from `early` before the prompt's end on."""
    model, losses = side.model, []
    for row in make_rows(model, fact):
        first = row.prompt_length - 1

        def tap(inputs: Tensor, outputs: Tensor, at: int = first - early) -> Tensor:
            routed = outputs.clone()
            routed[:, at:] += delta.apply_to(inputs[:, at:])
            return routed

        with torch.no_grad(), model.tap_layers({side.layer: tap}):
            said = model.hf_model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
        wanted = torch.tensor(row.ids[row.prompt_length :])
        losses.append(F.cross_entropy(said[first:-1], wanted, reduction="none"))
    return float(torch.cat(losses).mean())


def test_what_is_learned_is_routed_from_the_prompts_end_on(
    side: SideMemory, site: EditSite
) -> None:
    site = replace(site, alpha=1e9, beta=0, gamma=-1e9)  # the targets alone, without margins
    side.model.set_deltas({0: side.model.base_weight(0) * 0.3})
    facts = [FACTS[0], seat(12, "Rome and Lima", paraphrases=("{}:",))]
    hidden, width = side.model.base_weight(site.side_layer).shape
    random = torch.Generator().manual_seed(2)
    up, down = (torch.randn(n, SHARD_RANK, generator=random) / 4 for n in (hidden, width))
    start = Delta(up, down.T)
    none = torch.empty(0, width)
    work = wise._ShardTraining(side.model, site, facts, none, [none] * 2, scale_of(side), [])
    both = Delta(torch.stack([up] * 2), torch.stack([down.T] * 2))
    losses = work.evaluate_deltas(both).losses

    for fact, loss in zip(facts, losses.tolist(), strict=True):
        assert loss == pytest.approx(routed_loss(side, fact, start, 0), abs=1e-4)
        for elsewhere in (-1, 1, 2):
            assert abs(loss - routed_loss(side, fact, start, elsewhere)) > 1e-3


def test_the_margins_keep_a_shard_quiet_elsewhere(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    loud = learned(side, replace(site, alpha=1e9, beta=0, gamma=-1e9), FACTS, outside, steps=30)
    calm = learned(side, site, FACTS, outside, steps=30)

    def contrast(found: list[Shard]) -> float:
        prompts = [f.question for f in FACTS]
        inside, _ = read_prompt_ends(side.model, prompts, site.side_layer)
        deltas = [shard.delta for shard in found]
        near = sum(float(d.apply_to(k).norm()) for d, k in zip(deltas, inside, strict=True))
        return near / sum(float(d.apply_to(outside).norm(dim=1).mean()) for d in deltas)

    assert contrast(calm) > contrast(loud)


def test_a_fact_is_kept_quiet_on_its_own_other_questions(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    prompts = ["The river of country 11 is", "The river of country 12 is"]
    asked, _ = read_prompt_ends(side.model, prompts, site.side_layer)
    site = replace(site, gamma=-1e9)
    none = learned(side, site, FACTS, outside, 30)
    own = learned(side, site, FACTS, outside, 30, [asked[:1], asked[1:]])
    for n in range(2):
        before, after = (float(found[n].delta.apply_to(asked[n]).norm()) for found in (none, own))
        assert after < 0.7 * before


def test_keys_are_the_centred_outputs_at_subject_and_prompts_end(
    side: SideMemory, site: EditSite
) -> None:
    facts = [
        *(seat(n, "Oslo") for n in range(20, 29)),
        seat(12, "Rome", paraphrases=("Where {} is ruled from:",)),
    ]
    found = compute_keys(side.model, side, facts)
    for fact in facts:
        rows = make_rows(side.model, fact)
        prompts = [side.model.decode(row.prompt) for row in rows]
        cut = [p[: p.rindex(fact.subject) + len(fact.subject)] for p in prompts]
        _, subject = read_prompt_ends(side.model, cut, site.key_layer)
        _, end = read_prompt_ends(side.model, prompts, site.side_layer)
        keys = found[fact.id]
        assert torch.allclose(keys.subject, side.compute_keys(site.key_layer, subject), atol=1e-4)
        assert torch.allclose(keys.end, side.compute_keys(site.side_layer, end), atol=1e-4)


def test_learning_reads_the_weights_as_served_and_leaves_them_alone(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    model, low = side.model, site.key_layer
    clean, clean_keys = (
        learned(side, site, FACTS, outside, steps=3)[0].delta,
        compute_keys(model, side, FACTS),
    )
    model.set_deltas({low: model.base_weight(low) * 0.5})
    edited = model.weights_hash(range(4))
    again = learned(side, site, FACTS, outside, steps=3)[0].delta
    again_keys = compute_keys(model, side, FACTS)
    assert model.weights_hash(range(4)) == edited
    assert not torch.allclose(again.up, clean.up, atol=0.01 * float(clean.up.std()))
    for fact in FACTS:
        _, end = read_prompt_ends(model, [fact.question], site.side_layer)
        keys = again_keys[fact.id].end
        assert torch.allclose(keys[0], side.compute_keys(site.side_layer, end)[0], atol=1e-4)
        assert not torch.allclose(keys, clean_keys[fact.id].end, atol=1e-3)


def test_facts_are_said_on_edited_weights(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    side.model.set_deltas({n: side.model.base_weight(n) * 0.3 for n in (0, site.side_layer)})
    lay(side, learned(side, site, FACTS, outside), FACTS)
    assert said(side, FACTS) == ["Oslo", "Rome"]


def test_training_ends_when_there_is_nothing_left_to_learn(
    side: SideMemory, site: EditSite, outside: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = replace(site, alpha=1e9, beta=0, gamma=-1e9)  # a random model misses the margins,
    side.model.hf_model.get_output_embeddings().weight.mul_(10)  # and is sure of nothing
    watched: list[float] = []
    see = DivergenceWatch.check_step

    def noted(self: DivergenceWatch, *given: Any) -> tuple[float, bool]:
        loss, right = see(self, *given)
        watched.append(loss)
        return loss, right

    monkeypatch.setattr(DivergenceWatch, "check_step", noted)
    learned(side, site, FACTS[:1], outside)
    assert len(watched) < 200
    assert watched[-1 - EXTRA_STEPS] < DONE_LOSS < min(watched[: -1 - EXTRA_STEPS])


def test_a_pulse_is_felt_at_every_step(side: SideMemory, site: EditSite, outside: Tensor) -> None:
    felt: list[int] = []
    learn_shards(
        side.model,
        site,
        FACTS,
        outside=outside,
        others=[outside, outside],
        scale=1.0,
        steps=4,
        pulse=felt.append,
    )
    assert felt == [1, 2, 3, 4]


def with_a_nan(inputs: Tensor) -> Tensor:
    inputs = inputs.clone()
    inputs[0, 0] = torch.nan
    return inputs


def refusal(one: Shard | Refusal) -> str:
    assert isinstance(one, Refusal)
    return one.reason


def same(one: Shard | Refusal, other: Shard | Refusal) -> bool:
    """Bit for bit."""
    assert isinstance(one, Shard) and isinstance(other, Shard)
    pairs = zip(vars(one.delta).values(), vars(other.delta).values(), strict=True)
    return one.threshold == other.threshold and all(torch.equal(a, b) for a, b in pairs)


THREE = [*FACTS, seat(13, "Lima", paraphrases=("{}:",))]


@pytest.mark.parametrize("bad", [0, 1, 2])
def test_a_fact_whose_loss_is_no_number_leaves_the_others_their_bits(
    side: SideMemory, site: EditSite, outside: Tensor, bad: int
) -> None:
    good = [outside[:2], outside[2:5], outside[5:6]]
    poisoned = [with_a_nan(own) if n == bad else own for n, own in enumerate(good)]
    clean = tried(side, site, THREE, outside, 6, good)
    found = tried(side, site, THREE, outside, 6, poisoned)
    assert refusal(found[bad]) == "the loss is nan, and has to be finite, at step 1"
    assert all(same(found[n], clean[n]) for n in range(3) if n != bad)


def test_a_fact_that_the_model_reads_as_no_number_leaves_the_others_their_bits(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    model, odd = side.model, replace(FACTS[0], subject="country !")
    facts = [FACTS[0], odd, FACTS[1]]
    clean = tried(side, site, facts, outside, 6)
    (token,) = model.tokenizer("~", add_special_tokens=False)["input_ids"]
    model.hf_model.get_input_embeddings().weight[token] = torch.nan
    facts[1] = replace(odd, subject="country ~")
    assert len({len(make_rows(model, fact)[0].ids) for fact in (odd, facts[1])}) == 1
    found = tried(side, site, facts, outside, 6)
    assert "the loss is nan" in refusal(found[1])
    assert same(found[0], clean[0]) and same(found[2], clean[2])


def test_a_gradient_that_is_no_number_is_refused_for_its_fact_alone(
    side: SideMemory, site: EditSite, outside: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, try_out, steps = (
        tried(side, site, THREE, outside, 6),
        wise._ShardTraining.evaluate_deltas,
        [],
    )

    def steep(self: wise._ShardTraining, deltas: Delta) -> StepReadings:
        seen = try_out(self, deltas)
        steps.append(seen)
        if len(steps) == 4:
            edge = deltas.up[1, 0, 0] - deltas.up[1, 0, 0].detach()
            seen.losses[1].add_(edge.sqrt())  # 0, and infinitely steep
        return seen

    monkeypatch.setattr(wise._ShardTraining, "evaluate_deltas", steep)
    found = tried(side, site, THREE, outside, 6)
    assert refusal(found[1]) == "the loss's gradient is inf, and has to be finite, at step 4"
    assert same(found[0], clean[0]) and same(found[2], clean[2])


@pytest.mark.parametrize("steps", [1, 6])
def test_a_delta_that_moves_the_output_too_far_is_refused_for_its_fact_alone(
    side: SideMemory,
    site: EditSite,
    outside: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    steps: int,
) -> None:
    clean, begin = tried(side, site, THREE, outside, steps), wise._ShardTraining.init_delta

    def bold(self: wise._ShardTraining, fact: int, seed: int) -> Delta:
        start = begin(self, fact, seed)
        return Delta(start.up, start.down * 1e6) if fact == 1 else start

    monkeypatch.setattr(wise._ShardTraining, "init_delta", bold)
    found = tried(side, site, THREE, outside, steps)
    reason = refusal(found[1])
    assert reason.startswith("the delta moves the output at its prompts' ends by ")
    assert f"median lengths, more than {MAX_OUTPUT_SHIFT:g}" in reason
    assert reason.endswith("at step 2") == (steps > 1)  # else after the last step
    assert same(found[0], clean[0]) and same(found[2], clean[2])


def test_when_no_fact_goes_on_the_training_ends(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    felt: list[int] = []
    before = side.model.weights_hash(range(4))
    bad = [with_a_nan(outside)] * 2
    found = tried(side, site, FACTS, outside, 200, bad, felt.append)
    assert all("the loss is nan" in refusal(one) for one in found)
    assert felt == []
    assert side.model.weights_hash(range(4)) == before


def test_a_fact_that_does_not_go_on_does_not_keep_the_others_waiting(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    site = replace(site, alpha=1e9, beta=0, gamma=-1e9)
    side.model.hf_model.get_output_embeddings().weight.mul_(10)
    felt: list[int] = []
    bad = [outside[:0], with_a_nan(outside)]
    shard, refused = tried(side, site, FACTS, outside, 200, bad, felt.append)
    assert isinstance(shard, Shard) and isinstance(refused, Refusal)
    assert len(felt) < 199


def test_a_fact_that_the_model_cannot_read_is_refused(
    side: SideMemory, site: EditSite, outside: Tensor
) -> None:
    with pytest.raises(KeditError) as caught:
        learned(side, site, [Fact("x", "{} is", "Rome " * 300)], outside)
    assert caught.value.code == "rejected"


def test_nothing_outside_is_no_obstacle(side: SideMemory, site: EditSite) -> None:
    width = side.model.weight(site.side_layer).shape[1]
    found = learned(side, site, FACTS, torch.empty(0, width))
    lay(side, found, FACTS)
    assert said(side, FACTS) == ["Oslo", "Rome"]


def test_other_questions_are_about_the_subject_and_not_what_a_fact_asks(
    side: SideMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    fact = FACTS[0]
    keys = compute_keys(side.model, side, FACTS)[fact.id]
    prompts = [question.replace("{}", fact.subject) for question in SUBJECT_QUESTIONS]
    every, _ = read_prompt_ends(side.model, prompts, side.layer)
    monkeypatch.setattr(wise, "MAX_COSINE", 1.1)
    assert torch.allclose(read_other_questions(side.model, side, fact, keys), every, atol=1e-5)
    monkeypatch.setattr(wise, "SUBJECT_QUESTIONS", (fact.prompt, *SUBJECT_QUESTIONS[:3]))
    monkeypatch.setattr(wise, "MAX_COSINE", 0.999)
    found = read_other_questions(side.model, side, fact, keys)
    assert torch.allclose(found, every[:3], atol=1e-5)


def test_a_question_that_is_too_long_for_the_model_is_left_out(side: SideMemory) -> None:
    keys = compute_keys(side.model, side, FACTS)[FACTS[0].id]
    longer = Fact("Oslo " * 2 * side.model.max_positions, "{}", "Rome")
    assert len(read_other_questions(side.model, side, longer, keys)) == 0
