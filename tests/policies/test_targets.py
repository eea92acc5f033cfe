from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from editing_home import seat
from target_tools import FACT, KINDS, NORMS, OTHERS, STRONG, terms_of
from torch import Tensor

from memory.facts import Fact
from memory.model.editable import EditableModel
from policies.edit_site import EditSite, make_default_site
from policies.edit_terms import EditTerms, Refusal
from policies.prompts import make_rows
from policies.target_optimiser import TargetOptimiser
from policies.targets import MAX_SLOTS, PULSE_STEPS, compute_terms


@pytest.fixture
def site() -> EditSite:
    return replace(make_default_site(4), end_layers=(1, 2), target_steps=12)


@pytest.fixture(params=KINDS)
def any_site(request: pytest.FixtureRequest) -> EditSite:
    return replace(make_default_site(4), target_steps=12, **KINDS[request.param])


def assert_equal(one: EditTerms, other: EditTerms) -> None:
    assert (one.loss, one.steps) == (other.loss, other.steps)
    for layer in one.keys:
        assert torch.equal(one.keys[layer], other.keys[layer])
        assert torch.equal(one.residuals[layer], other.residuals[layer])


@pytest.mark.parametrize("place", [0, MAX_SLOTS - 1, MAX_SLOTS, MAX_SLOTS + 6, len(OTHERS)])
def test_a_facts_terms_are_the_same_bits_in_any_slot_and_turn(
    model: EditableModel, any_site: EditSite, place: int
) -> None:
    alone = terms_of(model, any_site, [FACT])
    among = [*OTHERS[:place], FACT, *OTHERS[place:]]
    assert len(among) > 2 * MAX_SLOTS
    assert_equal(alone, terms_of(model, any_site, among))


@pytest.mark.parametrize("kind", ["end", "both"])
def test_a_fact_keeps_its_bits_in_a_slot_that_another_left_early(
    model: EditableModel, kind: str
) -> None:
    site = replace(make_default_site(4), **KINDS[kind], **STRONG, target_steps=120)
    facts = [*OTHERS[: MAX_SLOTS + 4], FACT]
    passes: list[Tensor] = []
    with model.tap_layers({3: lambda inputs, _outputs: passes.append(inputs)}):
        found = compute_terms(model, site, NORMS, facts)
    steps = {n: terms.steps for n, terms in found.items() if isinstance(terms, EditTerms)}
    rounds = [max(steps[f.id] for f in part) for part in (facts[:MAX_SLOTS], facts[MAX_SLOTS:])]
    assert len(passes) - len(facts) < sum(rounds)  # none waits until all slots are free
    assert_equal(terms_of(model, site, [FACT]), found[FACT.id])  # type: ignore[arg-type]
    late = facts[MAX_SLOTS]
    assert_equal(terms_of(model, site, [late], late), found[late.id])  # type: ignore[arg-type]


def test_targets_of_another_length_in_company_make_no_difference(
    model: EditableModel, any_site: EditSite
) -> None:
    longer = [replace(f, target=f"{f.target} 1") for f in OTHERS[: MAX_SLOTS + 5]]
    lengths = {len(make_rows(model, f)[0].ids) for f in (longer[0], FACT)}
    assert len(lengths) == 2
    # FACT takes over the slot of a longer one, next to both longer ones and similar ones.
    facts = [*longer[:MAX_SLOTS], FACT, *longer[MAX_SLOTS:], *OTHERS[MAX_SLOTS + 5 :]]
    found = compute_terms(model, any_site, NORMS, facts)
    for fact in (longer[0], FACT):
        assert_equal(terms_of(model, any_site, [fact], fact), found[fact.id])  # type: ignore[arg-type]


def test_company_of_other_shapes_makes_no_difference(
    model: EditableModel, any_site: EditSite
) -> None:
    alone = terms_of(model, any_site, [FACT])
    odd = [
        seat(7, "Oslo and Rome and Lima"),
        seat(12, "Rome", paraphrases=("The seat of {}:",)),
        Fact("a country with a long name", "It is said that the seat of {} is", "Lima"),
    ]
    found = compute_terms(model, any_site, NORMS, [*odd, FACT])
    assert set(found) == {f.id for f in (*odd, FACT)}
    assert_equal(alone, found[FACT.id])  # type: ignore[arg-type]


def test_terms_are_computed_on_the_base_whatever_is_active(
    model: EditableModel, any_site: EditSite
) -> None:
    clean = terms_of(model, any_site, [FACT])
    model.set_deltas({1: model.base_weight(1) * 0.5, 3: model.base_weight(3) * -0.5})
    edited = model.weights_hash(range(4))
    assert_equal(clean, terms_of(model, any_site, [FACT]))
    assert model.weights_hash(range(4)) == edited


def poison(model: EditableModel, text: str, value: float) -> None:
    """Make the model's reading of a text something that is no number."""
    (token,) = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    model.hf_model.get_input_embeddings().weight[token] = value


@pytest.mark.parametrize("place", [0, 3])
def test_a_loss_that_is_no_number_refuses_that_fact_alone(
    model: EditableModel, any_site: EditSite, place: int
) -> None:
    poison(model, "~", torch.nan)
    bad = Fact("country ~", "The seat of {} is", "Rome")
    facts = [*OTHERS[:place], bad, *OTHERS[place:6], FACT]
    found = compute_terms(model, any_site, NORMS, facts)
    assert isinstance(found[bad.id], Refusal)
    assert "the target's loss: not finite" in found[bad.id].reason
    assert [f.id for f in facts if isinstance(found[f.id], Refusal)] == [bad.id]
    assert_equal(terms_of(model, any_site, [FACT]), found[FACT.id])  # type: ignore[arg-type]


@pytest.mark.parametrize("slope", [torch.nan, torch.inf, 1e25])
def test_a_gradient_that_is_no_number_refuses_that_fact_alone(
    model: EditableModel, any_site: EditSite, monkeypatch: pytest.MonkeyPatch, slope: float
) -> None:
    facts = [*OTHERS[:4], FACT]
    clean = compute_terms(model, any_site, NORMS, facts)
    loss, steps = TargetOptimiser.compute_losses, []

    def steep(self: TargetOptimiser, delta: dict[int, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        losses, right, drift = loss(self, delta)
        steps.append(len(delta))
        if len(steps) == 5:
            bad = torch.arange(MAX_SLOTS)[:, None, None] == 2
            for each in delta.values():
                each.register_hook(lambda gradient: torch.where(bad, slope, gradient))
        return losses, right, drift

    monkeypatch.setattr(TargetOptimiser, "compute_losses", steep)
    found = compute_terms(model, any_site, NORMS, facts)
    bad = found[facts[2].id]
    assert isinstance(bad, Refusal)
    assert bad.reason == "the target's gradient: not finite after 5 steps"
    for fact in (*facts[:2], *facts[3:]):
        assert_equal(clean[fact.id], found[fact.id])  # type: ignore[arg-type]


def test_a_fact_keeps_its_bits_in_a_slot_that_a_refused_one_left(
    model: EditableModel, any_site: EditSite
) -> None:
    poison(model, "~", torch.nan)
    bad = Fact("country ~", "The seat of {} is", "Rome")
    found = compute_terms(model, any_site, NORMS, [bad, *OTHERS[: MAX_SLOTS - 1], FACT])
    assert isinstance(found[bad.id], Refusal)
    assert_equal(terms_of(model, any_site, [FACT]), found[FACT.id])  # type: ignore[arg-type]


def test_a_fact_that_the_model_cannot_read_is_refused_alone(
    model: EditableModel, site: EditSite
) -> None:
    long = Fact("x", "{} is", "Rome " * 300)
    found = compute_terms(model, site, NORMS, [long, FACT])
    assert isinstance(found[long.id], Refusal)
    assert "256 at most" in found[long.id].reason
    assert isinstance(found[FACT.id], EditTerms)


def test_every_result_is_handed_over_once_as_it_comes(model: EditableModel, site: EditSite) -> None:
    site = replace(site, target_steps=PULSE_STEPS + 2)
    long = Fact("x", "{} is", "Rome " * 300)
    parts: list[dict[str, EditTerms | Refusal]] = []
    found = compute_terms(
        model, site, NORMS, [FACT, long, *OTHERS], lambda part: parts.append(dict(part))
    )
    assert list(parts[0]) == [long.id]  # before any work
    reported = [(fact_id, terms) for part in parts for fact_id, terms in part.items()]
    assert len(reported) == len(found) == len(OTHERS) + 2
    assert all(found[fact_id] is terms for fact_id, terms in reported)
    assert {} in parts  # a report while nothing was done


def test_a_report_sees_the_active_weights(model: EditableModel, site: EditSite) -> None:
    site = replace(site, target_steps=PULSE_STEPS + 2)
    model.set_deltas({1: model.base_weight(1) * 0.5, 3: model.base_weight(3) * -0.5})
    edited = model.weights_hash(range(4))
    seen: list[tuple[int, str]] = []

    def look(part: dict[str, EditTerms | Refusal]) -> None:
        seen.append((len(part), model.weights_hash(range(4))))

    compute_terms(model, site, NORMS, [FACT], look)
    assert [count for count, _ in seen] == [0, 0, 1]
    assert {weights for _, weights in seen} == {edited}


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_report_may_stop_the_work_and_keeps_the_active_weights(
    model: EditableModel, site: EditSite, call: int
) -> None:
    site = replace(site, target_steps=PULSE_STEPS + 2)
    model.set_deltas({1: model.base_weight(1) * 0.5})
    edited = model.weights_hash(range(4))
    calls: list[object] = []

    def stop(part: object) -> None:
        calls.append(part)
        if len(calls) == call:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        compute_terms(model, site, NORMS, [FACT], stop)
    assert model.weights_hash(range(4)) == edited


def test_a_failure_in_the_work_leaves_the_active_weights(
    model: EditableModel, site: EditSite
) -> None:
    model.set_deltas({1: model.base_weight(1) * 0.5})
    edited = model.weights_hash(range(4))

    def fail(_inputs: Tensor, _outputs: Tensor) -> None:
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"), model.tap_layers({3: fail}):
        compute_terms(model, site, NORMS, [FACT])
    assert model.weights_hash(range(4)) == edited


@pytest.mark.parametrize("kind", ["gpt2", "opt", "qwen3"])
def test_other_architectures_keep_a_facts_bits_too(
    kind: str, any_site: EditSite, model_folder: Callable[[str], Path]
) -> None:
    model = EditableModel.load(model_folder(kind), torch.device("cpu"))
    any_site = replace(any_site, target_steps=4)
    assert_equal(terms_of(model, any_site, [FACT]), terms_of(model, any_site, [*OTHERS, FACT]))


def test_a_target_far_beyond_its_anchor_is_for_the_side_memory(
    model: EditableModel, any_site: EditSite
) -> None:
    lengths = terms_of(model, any_site, [FACT]).lengths
    assert set(lengths) == {1, 2}
    near = replace(any_site, anchors={n: 0.51 * v for n, v in lengths.items()})
    assert_equal(terms_of(model, near, [FACT]), terms_of(model, any_site, [FACT]))
    far = replace(any_site, anchors={2: 0.49 * lengths[2]})
    refused = compute_terms(model, far, NORMS, [FACT])[FACT.id]
    assert isinstance(refused, Refusal) and refused.can_use_side
    assert f"layer 2 is {lengths[2]:.2f} long" in refused.reason


def test_a_targets_length_is_that_of_the_value_v(model: EditableModel, any_site: EditSite) -> None:
    norms = {n: 2.0 for n in range(4)}
    found = compute_terms(model, any_site, norms, [FACT])[FACT.id]
    assert isinstance(found, EditTerms)
    for layer, keys in found.keys.items():  # (rows, sites, width)
        values = keys @ model.base_weight(layer).T + found.residuals[layer]
        assert found.lengths[layer] == pytest.approx(float(values.norm(dim=-1).mean()) / 2)


def test_a_target_that_is_too_long_is_for_the_side_memory(
    model: EditableModel, any_site: EditSite
) -> None:
    long = replace(FACT, target="Rome Oslo " * 40)
    refused = compute_terms(model, any_site, NORMS, [long])[long.id]
    assert isinstance(refused, Refusal) and refused.can_use_side
    assert refused.reason.endswith("tokens, and the weights take at most 64")


def test_a_site_decides_what_ends_a_target(model: EditableModel, any_site: EditSite) -> None:
    site = replace(any_site, target_steps=4)
    stopped = replace(site, target_ending=".")
    plain, own = seat(1, "Oslo"), seat(1, "Au")
    ended, found = (terms_of(model, one, [plain], plain) for one in (site, stopped))
    assert ended.loss != found.loss
    ended, found = (terms_of(model, one, [own], own) for one in (site, stopped))
    assert_equal(ended, found)  # "Au." ends nothing
