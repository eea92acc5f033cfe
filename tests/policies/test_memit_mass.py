from dataclasses import replace

import pytest
import torch
from torch import Tensor

from memory.errors import KeditError, NotFinite
from memory.model.statistics import LayerStatistics
from policies.edit_site import EditSite, make_default_site
from policies.edit_terms import EditTerms, pack_terms, unpack_terms
from policies.memit_mass import WeightsTier
from policies.solver import RidgeSolver, stack_facts

WIDTH, HIDDEN = 24, 8
LAYERS = (1, 3)


@pytest.fixture
def site() -> EditSite:
    return replace(
        make_default_site(4),
        subject_layers=LAYERS[:1],
        end_layers=LAYERS[1:],
        prior=0.5,
        end_prior=2.0,
        ridge=0.05,
    )


def covariance(layer: int) -> Tensor:
    keys = torch.randn(50, WIDTH, generator=torch.Generator().manual_seed(layer))
    return keys.T @ keys / 50


@pytest.fixture
def tier(site: EditSite) -> WeightsTier:
    return fresh(site)


def fresh(site: EditSite) -> WeightsTier:
    return WeightsTier(
        site, {n: LayerStatistics(covariance(n), torch.zeros(HIDDEN), 1.0) for n in range(4)}
    )


def terms(seed: int, rows: int = 3, sites: int = 2) -> EditTerms:
    generator = torch.Generator().manual_seed(100 + seed)
    draw = (torch.randn(rows, sites, WIDTH, generator=generator) for _ in LAYERS)
    keys = {n: k.bfloat16().float() for n, k in zip(LAYERS, draw, strict=True)}  # as kept
    residuals = {n: torch.randn(sites, HIDDEN, generator=generator) for n in LAYERS}
    return EditTerms(keys, residuals, 0.25, 7, dict.fromkeys(keys, 1.0))


def packed(*seeds: int) -> dict[str, bytes]:
    return {f"{seed:012x}": pack_terms(terms(seed, 2 + seed % 2, 1 + seed)) for seed in seeds}


def test_terms_are_unpacked_as_they_were_packed() -> None:
    given = terms(1)
    keys, residuals = unpack_terms(pack_terms(given))
    assert set(keys) == set(residuals) == set(LAYERS)
    for n in LAYERS:
        assert keys[n].dtype is torch.bfloat16
        assert torch.equal(keys[n].float(), given.keys[n])
        assert torch.equal(residuals[n], given.residuals[n])


def test_a_layers_delta_is_the_joint_solve_of_every_key(tier: WeightsTier, site: EditSite) -> None:
    deltas = tier.solve_deltas(packed(1, 2))
    assert set(deltas) == set(LAYERS)
    for n in LAYERS:
        keys, wanted = [], []
        for seed in (1, 2):
            of_fact = terms(seed, 2 + seed % 2, 1 + seed)
            for row in of_fact.keys[n]:  # each context has its own keys, and the fact's residuals
                for key, residual in zip(row, of_fact.residuals[n], strict=True):
                    keys.append(tier.get_grid(n).round_keys(key))
                    wanted.append(tier.get_grid(n).round_residuals(residual))
        k, r = torch.stack(keys).double(), torch.stack(wanted).double()
        c0 = covariance(n).double()
        prior = site.prior if n in site.subject_layers else site.end_prior
        a = prior * c0 + site.ridge * float(c0.trace()) / WIDTH * torch.eye(WIDTH).double()
        expected = r.T @ k @ torch.linalg.inv(a + k.T @ k)
        assert torch.allclose(deltas[n].double(), expected, rtol=1e-4, atol=1e-6)


def test_the_order_in_which_facts_came_leaves_no_bit(site: EditSite) -> None:
    """With so weak a prior that rounding shows."""
    statistics = {n: LayerStatistics(covariance(n), torch.zeros(HIDDEN), 1.0) for n in LAYERS}
    tier = WeightsTier(replace(site, prior=1e-12, end_prior=1e-12, ridge=1e-12), statistics)
    one = tier.solve_deltas(packed(*range(8)))
    other = tier.solve_deltas(packed(5, 3, 7, 1, 0, 6, 2, 4))
    assert all(torch.equal(one[n], other[n]) for n in LAYERS)


def test_a_fact_that_was_taken_out_leaves_no_bit(tier: WeightsTier) -> None:
    never = tier.solve_deltas(packed(1, 3))
    held = packed(1, 2, 3)
    with_it = tier.solve_deltas(held)
    del held[f"{2:012x}"]
    without = tier.solve_deltas(held)
    assert all(torch.equal(without[n], never[n]) for n in LAYERS)
    assert not any(torch.allclose(with_it[n], never[n]) for n in LAYERS)


def test_no_facts_no_deltas(tier: WeightsTier) -> None:
    assert tier.solve_deltas({}) == {}


def test_terms_that_are_not_finite_are_refused(tier: WeightsTier) -> None:
    given = terms(1)
    given.residuals[3][0, 0] = torch.nan
    with pytest.raises(KeditError) as caught:
        tier.solve_deltas({"1": pack_terms(given)})
    assert caught.value.code == "non-finite"


def test_the_factors_are_those_of_the_solve(tier: WeightsTier) -> None:
    facts = packed(1, 2, 3)
    deltas, factors = tier.solve_deltas(facts), tier.solve_factors(facts)
    sites = sum(1 + seed for seed in (1, 2, 3))
    for n in LAYERS:
        down, up = factors[n]
        assert (down.shape, up.shape) == ((HIDDEN, sites), (sites, WIDTH))
        torch.testing.assert_close(down @ up, deltas[n], rtol=1e-5, atol=1e-6)
        ratio = down.norm(dim=0) / up.norm(dim=1)
        assert ((ratio > 0.4) & (ratio < 2.5)).all()
    assert tier.solve_factors({}) == {}


def test_the_factors_of_more_keys_than_the_layer_is_wide(tier: WeightsTier) -> None:
    facts = packed(*range(8))
    deltas, factors = tier.solve_deltas(facts), tier.solve_factors(facts)
    for n in LAYERS:
        down, up = factors[n]
        assert len(up) > WIDTH
        torch.testing.assert_close(down @ up, deltas[n], rtol=1e-4, atol=1e-5)


def test_many_facts_are_the_same_solve_and_the_same_bytes_whatever_left_before(
    tier: WeightsTier, site: EditSite
) -> None:
    every = packed(*range(40))
    kept = {n: blob for n, blob in every.items() if n != min(every)}
    other = fresh(site)
    other.solve_deltas(kept)
    tier.solve_deltas(every)
    found = tier.solve_deltas(kept, every.get)
    for n in LAYERS:
        # In float32 the solve would hide sums that were rounded.
        assert torch.equal(tier._summed._sums[n].gram, other._summed._sums[n].gram)
        assert torch.equal(tier._summed._sums[n].cross, other._summed._sums[n].cross)
    for n in LAYERS:
        unpacked = [unpack_terms(kept[fact_id]) for fact_id in sorted(kept)]
        keys, residuals = stack_facts([(k[n], r[n]) for k, r in unpacked])
        prior = site.prior if n in site.subject_layers else site.end_prior
        plain = RidgeSolver(covariance(n), prior, site.ridge).solve(keys, residuals)
        assert torch.allclose(found[n], plain, rtol=1e-3, atol=1e-3)


def test_many_facts_of_which_one_is_not_finite_are_refused(
    tier: WeightsTier, site: EditSite
) -> None:
    every = packed(*range(40))
    broken = terms(1)
    broken.residuals[LAYERS[0]][0, 0] = float("nan")
    with pytest.raises(NotFinite):
        tier.solve_deltas(every | {"f" * 12: pack_terms(broken)})
    found, plain = tier.solve_deltas(every), fresh(site).solve_deltas(every)
    assert all(torch.equal(found[n], plain[n]) for n in LAYERS)
