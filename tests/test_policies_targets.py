from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CITIES, seat
from torch import Tensor
from torch.nn import functional as F

from memory.facts import Fact
from memory.model import EditableModel
from policies.prompts import rows_of
from policies.site import EditSite, Token, default_site
from policies.targets import PULSE, SEATS, Refused, Terms, compute_terms

NORMS = {n: 1.0 for n in range(4)}
FACT = seat(11, "Oslo")
OTHERS = [seat(n, CITIES[n % len(CITIES)]) for n in range(12, 52)]  # of one shape with FACT


@pytest.fixture
def site() -> EditSite:
    return replace(default_site(4), layers=(1, 2), target_steps=12)


def terms_of(model: EditableModel, site: EditSite, facts: list[Fact], fact: Fact = FACT) -> Terms:
    found = compute_terms(model, site, NORMS, facts)[fact.id]
    assert isinstance(found, Terms)
    return found


def assert_equal(one: Terms, other: Terms) -> None:
    assert (one.loss, one.steps) == (other.loss, other.steps)
    for layer in one.keys:
        assert torch.equal(one.keys[layer], other.keys[layer])
        assert torch.equal(one.residuals[layer], other.residuals[layer])


def logits_with(model: EditableModel, found: Terms, row: int, fact: Fact, token: Token) -> Tensor:
    """Logits (tokens, vocabulary) of one of the fact's rows, its residuals put in by hand."""
    (ids, sites) = ((r := rows_of(model, fact, token)[row]).ids, list(r.sites))

    def add(layer: int) -> Callable[[Tensor, Tensor], Tensor]:
        def tap(inputs: Tensor, outputs: Tensor) -> Tensor:
            assert torch.allclose(inputs[0, sites], found.keys[layer][row], atol=1e-4)
            moved = outputs.clone()
            moved[0, sites] += found.residuals[layer]
            return moved

        return tap

    with torch.no_grad(), model.tap({n: add(n) for n in found.keys}):
        return model.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def test_with_its_residuals_at_its_sites_the_model_says_the_fact(
    model: EditableModel, site: EditSite
) -> None:
    site = replace(site, target_steps=80, target_rate=0.5, clamp=40.0)
    found = terms_of(model, site, [FACT, *OTHERS])
    for n, row in enumerate(rows_of(model, FACT, site.token)):
        said = logits_with(model, found, n, FACT, site.token)[row.prompt_length - 1 : -1]
        assert said.argmax(-1).tolist() == list(row.ids[row.prompt_length :])
    assert found.steps < site.target_steps


@pytest.mark.parametrize("token", Token)
def test_residuals_make_the_fact_likelier(
    model: EditableModel, site: EditSite, token: Token
) -> None:
    site = replace(site, token=token, clamp=40.0, target_steps=40)
    found = terms_of(model, site, [FACT, *OTHERS])
    before = after = 0.0
    for n, row in enumerate(rows_of(model, FACT, token)):
        wanted, at = torch.tensor(row.ids[row.prompt_length :]), slice(row.prompt_length - 1, -1)
        with torch.no_grad():
            plain = model.model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
        before += float(F.cross_entropy(plain[at], wanted))
        after += float(F.cross_entropy(logits_with(model, found, n, FACT, token)[at], wanted))
    assert after < before - (0.5 if token is Token.PROMPT else 0.1)


def test_no_residual_is_longer_than_the_clamp(model: EditableModel, site: EditSite) -> None:
    site = replace(site, clamp=0.5, target_steps=30)
    for layer, norm in ((1, 1.0), (2, 3.0)):
        found = compute_terms(model, site, {1: 1.0, 2: 3.0}, [FACT])[FACT.id]
        assert isinstance(found, Terms)
        lengths = found.residuals[layer].norm(dim=-1)
        assert float(lengths.max()) <= 0.5 * norm * 1.0001
        assert float(lengths.max()) > 0.1 * norm


@pytest.mark.parametrize("place", [0, 5, SEATS - 1, SEATS, SEATS + 6, len(OTHERS)])
def test_a_facts_terms_are_the_same_bits_at_any_seat_and_turn(
    model: EditableModel, site: EditSite, place: int
) -> None:
    alone = terms_of(model, site, [FACT])
    among = [*OTHERS[:place], FACT, *OTHERS[place:]]
    assert len(among) > 2 * SEATS
    assert_equal(alone, terms_of(model, site, among))


def test_a_fact_keeps_its_bits_on_a_seat_that_another_left_early(
    model: EditableModel, site: EditSite
) -> None:
    site = replace(site, target_steps=80, target_rate=0.5, clamp=40.0)
    facts = [*OTHERS[: SEATS + 4], FACT]
    passes: list[Tensor] = []
    with model.tap({3: lambda inputs, _outputs: passes.append(inputs)}):
        found = compute_terms(model, site, NORMS, facts)
    steps = {n: terms.steps for n, terms in found.items() if isinstance(terms, Terms)}
    rounds = [max(steps[f.id] for f in part) for part in (facts[:SEATS], facts[SEATS:])]
    assert len(passes) - len(facts) < sum(rounds)  # none waits until all seats are free
    assert_equal(terms_of(model, site, [FACT]), found[FACT.id])  # type: ignore[arg-type]
    late = facts[SEATS]
    assert_equal(terms_of(model, site, [late], late), found[late.id])  # type: ignore[arg-type]


def test_targets_of_another_length_in_company_make_no_difference(
    model: EditableModel, site: EditSite
) -> None:
    site = replace(site, token=Token.SUBJECT)
    longer = [replace(f, target=f"{f.target} 1") for f in OTHERS[: SEATS + 5]]
    lengths = {len(rows_of(model, f, site.token)[0].ids) for f in (longer[0], FACT)}
    assert len(lengths) == 2
    # FACT takes over the seat of a longer one, and sits beside both longer ones and its like.
    facts = [*longer[:SEATS], FACT, *longer[SEATS:], *OTHERS[SEATS + 5 :]]
    found = compute_terms(model, site, NORMS, facts)
    for fact in (longer[0], FACT):
        assert_equal(terms_of(model, site, [fact], fact), found[fact.id])  # type: ignore[arg-type]


def test_company_of_other_shapes_makes_no_difference(model: EditableModel, site: EditSite) -> None:
    alone = terms_of(model, site, [FACT])
    odd = [
        seat(7, "Oslo and Rome and Lima"),
        seat(12, "Rome", paraphrases=("The seat of {}:",)),
        Fact("a country with a long name", "It is said that the seat of {} is", "Lima"),
    ]
    found = compute_terms(model, site, NORMS, [*odd, FACT])
    assert set(found) == {f.id for f in (*odd, FACT)}
    assert_equal(alone, found[FACT.id])  # type: ignore[arg-type]


def test_terms_are_computed_on_the_base_whatever_is_active(
    model: EditableModel, site: EditSite
) -> None:
    clean = terms_of(model, site, [FACT])
    model.set_deltas({1: model.base_weight(1) * 0.5, 3: model.base_weight(3) * -0.5})
    edited = model.weights_hash(range(4))
    assert_equal(clean, terms_of(model, site, [FACT]))
    assert model.weights_hash(range(4)) == edited


def test_each_row_and_site_has_its_key(model: EditableModel, site: EditSite) -> None:
    for token in Token:
        fact = seat(11, "Oslo and Rome", paraphrases=("The seat of {}:",))
        rows = rows_of(model, fact, token)
        found = terms_of(model, replace(site, token=token, target_steps=2), [fact], fact)
        sites = len(rows[0].sites)
        predicting = len(rows[0].ids) - rows[0].prompt_length
        assert sites == (predicting if token is Token.PROMPT else 1)
        assert predicting > 1
        for layer in site.layers:
            width = model.weight(layer).shape[1]
            assert found.keys[layer].shape == (len(rows), sites, width)
            assert found.residuals[layer].shape == (sites, model.hidden)


def poison(model: EditableModel, text: str, value: float) -> None:
    """Make the model's reading of a text something that is no number."""
    (token,) = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    model.model.get_input_embeddings().weight[token] = value


@pytest.mark.parametrize("place", [0, 3])
def test_a_loss_that_is_no_number_refuses_that_fact_alone(
    model: EditableModel, site: EditSite, place: int
) -> None:
    poison(model, "~", torch.nan)
    bad = Fact("country ~", "The seat of {} is", "Rome")
    facts = [*OTHERS[:place], bad, *OTHERS[place:6], FACT]
    found = compute_terms(model, site, NORMS, facts)
    assert isinstance(found[bad.id], Refused)
    assert "not finite" in found[bad.id].reason
    assert [f.id for f in facts if isinstance(found[f.id], Refused)] == [bad.id]
    assert_equal(terms_of(model, site, [FACT]), found[FACT.id])  # type: ignore[arg-type]


def test_a_fact_keeps_its_bits_on_a_seat_that_a_refused_one_left(
    model: EditableModel, site: EditSite
) -> None:
    poison(model, "~", torch.nan)
    bad = Fact("country ~", "The seat of {} is", "Rome")
    found = compute_terms(model, site, NORMS, [bad, *OTHERS[: SEATS - 1], FACT])
    assert isinstance(found[bad.id], Refused)
    assert_equal(terms_of(model, site, [FACT]), found[FACT.id])  # type: ignore[arg-type]


def test_a_fact_that_the_model_cannot_read_is_refused_alone(
    model: EditableModel, site: EditSite
) -> None:
    long = Fact("x", "{} is", "Rome " * 300)
    found = compute_terms(model, site, NORMS, [long, FACT])
    assert isinstance(found[long.id], Refused)
    assert "256 at most" in found[long.id].reason
    assert isinstance(found[FACT.id], Terms)


def test_every_result_is_handed_over_once_as_it_comes(model: EditableModel, site: EditSite) -> None:
    site = replace(site, target_steps=PULSE + 2)
    long = Fact("x", "{} is", "Rome " * 300)
    parts: list[dict[str, Terms | Refused]] = []
    found = compute_terms(
        model, site, NORMS, [FACT, long, *OTHERS], lambda part: parts.append(dict(part))
    )
    assert list(parts[0]) == [long.id]  # before any work
    told = [(fact_id, terms) for part in parts for fact_id, terms in part.items()]
    assert len(told) == len(found) == len(OTHERS) + 2
    assert all(found[fact_id] is terms for fact_id, terms in told)
    assert {} in parts  # heard from while nothing was done


def test_who_is_told_sees_the_active_weights(model: EditableModel, site: EditSite) -> None:
    site = replace(site, target_steps=PULSE + 2)
    model.set_deltas({1: model.base_weight(1) * 0.5, 3: model.base_weight(3) * -0.5})
    edited = model.weights_hash(range(4))
    seen: list[tuple[int, str]] = []

    def look(part: dict[str, Terms | Refused]) -> None:
        seen.append((len(part), model.weights_hash(range(4))))

    compute_terms(model, site, NORMS, [FACT], look)
    assert [told for told, _ in seen] == [0, 0, 1]
    assert {weights for _, weights in seen} == {edited}


@pytest.mark.parametrize("call", [1, 2, 3])
def test_who_is_told_may_stop_the_work_and_keeps_the_active_weights(
    model: EditableModel, site: EditSite, call: int
) -> None:
    site = replace(site, target_steps=PULSE + 2)
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

    with pytest.raises(RuntimeError, match="stopped"), model.tap({3: fail}):
        compute_terms(model, site, NORMS, [FACT])
    assert model.weights_hash(range(4)) == edited


@pytest.mark.parametrize("kind", ["gpt2", "opt", "qwen3"])
def test_other_architectures_keep_a_facts_bits_too(
    kind: str, site: EditSite, model_folder: Callable[[str], Path]
) -> None:
    model = EditableModel.load(model_folder(kind), torch.device("cpu"))
    site = replace(site, target_steps=4)
    assert_equal(terms_of(model, site, [FACT]), terms_of(model, site, [*OTHERS, FACT]))
