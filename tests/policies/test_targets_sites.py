"""Where targets are put: at the subject, where the target is predicted, or at both."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from editing_home import seat
from target_tools import FACT, KINDS, NORMS, OTHERS, STRONG, logits_with, sites_of, terms_of
from tiny_models import CITIES
from torch import Tensor
from torch.nn import functional as F

from memory.facts import Fact
from memory.model.editable import EditableModel
from policies.edit_site import EditSite, make_default_site
from policies.edit_terms import EditTerms
from policies.prompts import make_essence_row, make_rows
from policies.targets import compute_terms


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device without bfloat16, so that what is put in by hand agrees to the last digits."""
    monkeypatch.setattr("memory.model.editable.has_fast_bfloat16", lambda _device: False)


@pytest.fixture(params=KINDS)
def any_site(request: pytest.FixtureRequest) -> EditSite:
    return replace(make_default_site(4), target_steps=12, **KINDS[request.param])


@pytest.mark.parametrize("kind", ["end", "both"])
def test_with_its_residuals_at_its_sites_the_model_says_the_fact(
    model: EditableModel, kind: str
) -> None:
    site = replace(make_default_site(4), **KINDS[kind], **STRONG, target_steps=120)
    found = terms_of(model, site, [FACT, *OTHERS])
    for n, row in enumerate(make_rows(model, FACT)):
        said = logits_with(model, site, found, n)
        assert said.argmax(-1).tolist() == list(row.target)
    assert found.steps < site.target_steps


@pytest.mark.parametrize(("kind", "least"), [("subject", 0.1), ("end", 0.5), ("both", 0.5)])
def test_residuals_make_the_fact_likelier(model: EditableModel, kind: str, least: float) -> None:
    site = replace(make_default_site(4), clamp=40.0, **KINDS[kind])
    found = terms_of(model, site, [FACT, *OTHERS])
    rows, after, before = make_rows(model, FACT), [], []
    for n, row in enumerate(rows):
        wanted = torch.tensor(row.target)
        with torch.no_grad():
            plain = model.hf_model(input_ids=torch.tensor([row.ids]), use_cache=False).logits[0]
        before.append(float(F.cross_entropy(plain[row.prompt_length - 1 : -1], wanted)))
        after.append(float(F.cross_entropy(logits_with(model, site, found, n), wanted)))
    assert sum(after) / len(rows) == pytest.approx(found.loss, abs=1e-4)
    assert sum(after) < sum(before) - least


@pytest.mark.parametrize("kind", KINDS)
def test_no_residual_is_longer_than_the_clamp(model: EditableModel, kind: str) -> None:
    site = replace(make_default_site(4), clamp=0.5, target_steps=30, **KINDS[kind])
    norms = {1: 1.0, 2: 3.0}
    found = compute_terms(model, site, norms, [FACT])[FACT.id]
    assert isinstance(found, EditTerms)
    for layer, norm in norms.items():
        lengths = found.residuals[layer].norm(dim=-1)
        assert float(lengths.max()) <= 0.5 * norm * 1.0001
        assert float(lengths.max()) > 0.1 * norm


def test_each_row_and_site_has_its_key(model: EditableModel, any_site: EditSite) -> None:
    fact = seat(11, "Oslo and Rome", paraphrases=("The seat of {}:",))
    rows = make_rows(model, fact)
    found = terms_of(model, replace(any_site, target_steps=5), [fact], fact)
    assert set(found.keys) == set(found.residuals) == set(any_site.layers)
    for layer in any_site.layers:
        sites, width = len(sites_of(any_site, rows[0], layer)), model.weight(layer).shape[1]
        assert sites == 1 if layer in any_site.subject_layers else sites > 3
        assert found.keys[layer].shape == (len(rows), sites, width)
        assert found.residuals[layer].shape == (sites, model.hidden_size)
        assert float(found.residuals[layer].norm(dim=-1).min()) > 0


@pytest.mark.parametrize("end_from", [12, 13, 1000])
def test_end_layers_that_never_join_in_stay_at_exactly_zero(
    model: EditableModel, end_from: int
) -> None:
    site = replace(make_default_site(4), **KINDS["both"], target_steps=12)
    found = terms_of(model, replace(site, end_from=end_from), [FACT])
    assert found.steps == 12
    assert not found.residuals[2].any()
    assert found.residuals[1].any()


@pytest.mark.parametrize(("end_from", "steps"), [(11, 12), (0, 1), (5, 12)])
def test_end_layers_move_from_the_step_after_on(
    model: EditableModel, end_from: int, steps: int
) -> None:
    site = replace(make_default_site(4), **KINDS["both"], target_steps=steps)
    found = terms_of(model, replace(site, end_from=end_from), [FACT])
    assert float(found.residuals[2].norm(dim=-1).min()) > 0
    before = terms_of(model, replace(site, end_from=end_from, target_steps=end_from), [FACT])
    assert not before.residuals[2].any()


def test_until_they_join_in_end_layers_are_as_if_they_were_not_there(
    model: EditableModel,
) -> None:
    """But for the shared step size, which their gradient is part of."""
    both = replace(make_default_site(4), **KINDS["both"], target_steps=1)
    alone = replace(both, end_layers=())
    with_end, without = (
        terms_of(model, replace(s, end_from=1), [FACT]).residuals[1] for s in (both, alone)
    )
    assert float(F.cosine_similarity(with_end, without).min()) > 0.9999


def test_end_keys_are_read_under_what_the_subject_layers_add(model: EditableModel) -> None:
    site = replace(make_default_site(4), **KINDS["both"], **STRONG, target_steps=20)
    norms = {1: 2.0, 2: 0.5}
    found = compute_terms(model, site, norms, [*OTHERS[:3], FACT])[FACT.id]
    assert isinstance(found, EditTerms)
    for n, row in enumerate(make_rows(model, FACT)):
        at, caught = sites_of(site, row, 2), list[Tensor]()

        def read(inputs: Tensor, _outputs: Tensor, to: list[Tensor] = caught) -> None:
            to.append(inputs[0])

        def add(_inputs: Tensor, outputs: Tensor, subject: int = row.subject_index) -> Tensor:
            moved = outputs.clone()
            moved[0, subject] += found.residuals[1][0]
            return moved

        ids = torch.tensor([row.ids])
        with torch.no_grad():
            with model.tap_layers({2: read}):
                model.hf_model(input_ids=ids, use_cache=False)
            with model.tap_layers({1: add, 2: read}):
                model.hf_model(input_ids=ids, use_cache=False)
        plain, under = (keys[at] for keys in caught)
        assert torch.allclose(found.keys[2][n], under, atol=1e-4)
        assert not torch.allclose(found.keys[2][n], plain, atol=1e-2)


@pytest.mark.parametrize(
    "layers",
    [
        {"subject_layers": (3,), "end_layers": (1,)},
        {"subject_layers": (2, 0), "end_layers": (3, 1)},
        {"subject_layers": (0,), "end_layers": ()},
        {"subject_layers": (), "end_layers": (3,)},
    ],
)
def test_layers_of_both_kinds_may_stand_in_any_order(
    model: EditableModel, layers: dict[str, Any]
) -> None:
    site = replace(make_default_site(4), **layers, **STRONG, target_steps=10)
    norms = {0: 1.5, 1: 2.0, 2: 0.5, 3: 3.0}
    fact = seat(11, "Oslo and Rome", paraphrases=("The seat of {}:", "Of {}, the seat is"))
    found = compute_terms(model, site, norms, [fact])[fact.id]
    assert isinstance(found, EditTerms)
    losses = [
        F.cross_entropy(logits_with(model, site, found, n, fact), torch.tensor(row.target))
        for n, row in enumerate(make_rows(model, fact))
    ]
    assert float(torch.stack(losses).mean()) == pytest.approx(found.loss, abs=1e-4)


def test_a_paraphrase_without_the_subject_is_changed_at_its_end(model: EditableModel) -> None:
    fact = seat(11, "Oslo", paraphrases=("Its seat, as is known, is",))
    site = replace(make_default_site(4), **KINDS["both"], **STRONG, target_steps=8)
    found = terms_of(model, site, [fact], fact)
    rows = make_rows(model, fact)
    assert sites_of(site, rows[-1], 1) == [rows[-1].prompt_length - 1]
    for n, row in enumerate(rows):
        assert logits_with(model, site, found, n, fact).shape[0] == len(row.target)


def test_a_fact_that_its_subject_carries_in_time_needs_nothing_at_the_end(
    model: EditableModel,
) -> None:
    """Without an end of text, and with the prompt ending with it, the subject alone suffices."""
    model.tokenizer.eos_token = None
    site = replace(make_default_site(4), **KINDS["both"], **STRONG, target_steps=80)
    site = replace(site, end_from=70)
    easy = [Fact(f"country {n}", "The seat of {}", CITIES[n % len(CITIES)]) for n in range(3)]
    hard = seat(12, "Rome and Lima and Cairo")
    found = compute_terms(model, site, NORMS, [*easy, hard])
    for fact in easy:
        early = found[fact.id]
        assert isinstance(early, EditTerms)
        assert early.steps < site.end_from
        assert not early.residuals[2].any()
        assert early.residuals[1].any()
    late = found[hard.id]
    assert isinstance(late, EditTerms)
    assert late.steps > site.end_from
    assert late.residuals[2].any()


def test_each_kind_of_layer_has_its_own_rate(model: EditableModel) -> None:
    site = replace(make_default_site(4), **KINDS["both"], target_steps=1, target_rate=0.2)
    site = replace(site, end_from=0, clamp=1e9)
    one = terms_of(model, replace(site, end_rate=0.1), [FACT])
    other = terms_of(model, replace(site, end_rate=0.4), [FACT])
    assert torch.equal(one.residuals[1], other.residuals[1])
    assert torch.allclose(4 * one.residuals[2], other.residuals[2], rtol=1e-5)


def essence_drift(model: EditableModel, essence: float) -> float:
    """KL of what follows "<subject> is a" under the residuals at the subject, from before."""
    site = replace(
        make_default_site(4), **KINDS["subject"], **STRONG, target_steps=40, essence=essence
    )
    found = terms_of(model, site, [FACT, *OTHERS])
    row = make_essence_row(model, FACT)
    ids = torch.tensor([row.prompt])

    def add(layer: int) -> Callable[[Tensor, Tensor], Tensor]:
        def tap(_inputs: Tensor, outputs: Tensor) -> Tensor:
            moved = outputs.clone()
            moved[0, row.subject_index] += found.residuals[layer][0]
            return moved

        return tap

    with torch.no_grad():
        before = model.hf_model(input_ids=ids, use_cache=False).logits[0, -1].log_softmax(-1)
        with model.tap_layers({n: add(n) for n in site.subject_layers}):
            after = model.hf_model(input_ids=ids, use_cache=False).logits[0, -1].log_softmax(-1)
    return float(F.kl_div(after, before, reduction="sum", log_target=True))


def test_the_subject_stays_what_it_is(model: EditableModel) -> None:
    free, held = essence_drift(model, 0.0), essence_drift(model, 1000.0)
    assert 0 < held < 0.5 * free


@pytest.mark.parametrize("kind", KINDS)
def test_the_essence_gives_no_keys(model: EditableModel, kind: str) -> None:
    for essence in (0.0, 1.0):
        site = replace(make_default_site(4), target_steps=2, essence=essence, **KINDS[kind])
        found = terms_of(model, site, [FACT])
        assert {len(keys) for keys in found.keys.values()} == {len(make_rows(model, FACT))}
