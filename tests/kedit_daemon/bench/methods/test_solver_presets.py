from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kedit_daemon.bench.methods.solver_presets import (
    NULL_SPACE_LIMIT,
    PRESETS,
    PresetStream,
    SolverSettings,
)
from memory.errors import KeditError
from memory.model.statistics import LayerStatistics
from policies.edit_site import EditSite, make_default_site
from policies.edit_terms import EditTerms, pack_terms
from policies.memit_mass import WeightsTier
from policies.solver import RidgeSolver

WIDTH, HIDDEN = 40, 12
SUBJECT, END = 1, 3
LAYERS = (SUBJECT, END)
QUIET = 15  # directions in which ordinary text has hardly any weight
SEQUENTIAL = ["memit", "encore", "alphaedit", "emmet"]
every_preset = pytest.mark.parametrize("name", list(PRESETS))


def site(**changes: float) -> EditSite:
    layers = replace(make_default_site(4), subject_layers=(SUBJECT,), end_layers=(END,))
    return replace(layers, **{"prior": 0.3, "end_prior": 2.0, "ridge": 0.05, **changes})


def covariance(layer: int) -> Tensor:
    """As of ordinary text: QUIET eigenvalues of a hundredth of the threshold, the others apart."""
    generator = torch.Generator().manual_seed(layer)
    turn = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator).double()).Q
    values = torch.linspace(0.5, 4.0, WIDTH).double()
    values[:QUIET] = NULL_SPACE_LIMIT / 100
    return ((turn * values) @ turn.T).float()


def statistics(unit: float = 1.0) -> dict[int, LayerStatistics]:
    return {n: LayerStatistics(covariance(n) * unit**2, torch.zeros(HIDDEN), 1.0) for n in LAYERS}


def stream(name: str, **changes: float) -> PresetStream:
    return PresetStream(PRESETS[name], site(**changes), statistics())


def last(edited: PresetStream, given: Sequence[Sequence[EditTerms]]) -> dict[int, Tensor]:
    return [edited.add(batch) for batch in given][-1]


def fact(seed: int, contexts: int = 2) -> EditTerms:
    """A subject layer has one site, an end layer one for every token."""
    generator = torch.Generator().manual_seed(100 + seed)
    sites = {SUBJECT: 1, END: 2}
    keys = {n: torch.randn(contexts, k, WIDTH, generator=generator) for n, k in sites.items()}
    residuals = {n: torch.randn(k, HIDDEN, generator=generator) for n, k in sites.items()}
    return EditTerms(keys, residuals, 0.25, 7, dict.fromkeys(keys, 1.0))


def batches(count: int = 3, facts: int = 4) -> list[list[EditTerms]]:
    return [[fact(facts * b + n, 1 + n % 2) for n in range(facts)] for b in range(count)]


def rows(batch: Sequence[EditTerms], layer: int) -> tuple[Tensor, Tensor]:
    """Keys (width, n) and residuals (hidden, n), in columns as the papers have them."""
    keys, residuals = [], []
    for terms in batch:
        for context in terms.keys[layer]:
            for key, residual in zip(context, terms.residuals[layer], strict=True):
                keys.append(key.double())
                residuals.append(residual.double())
    return torch.stack(keys, 1), torch.stack(residuals, 1)


class Paper:
    """Every batch by the formula of the paper, dense, on weights W that are really there."""

    def __init__(self, layer: int) -> None:
        self.c0 = covariance(layer).double()
        self.unit = float(self.c0.trace()) / WIDTH
        self.prior = site().prior if layer == SUBJECT else site().end_prior
        self.ridge = site().ridge * self.unit * torch.eye(WIDTH).double()
        self.base = torch.randn(HIDDEN, WIDTH, generator=torch.Generator().manual_seed(9)).double()
        self.weight = self.base.clone()
        self.past = torch.zeros(WIDTH, WIDTH).double()

    def step(self, name: str, k: Tensor, delta: Tensor) -> Tensor:
        r = self.base @ k + delta - self.weight @ k
        step: Tensor = getattr(self, name)(k, r)
        self.weight = self.weight + step
        self.past = self.past + k @ k.T
        return self.weight - self.base

    def memit(self, k: Tensor, r: Tensor) -> Tensor:
        return r @ k.T @ torch.linalg.inv(self.prior * self.c0 + k @ k.T)

    def encore(self, k: Tensor, r: Tensor) -> Tensor:
        a = self.prior * self.c0 + self.ridge + self.past + k @ k.T
        return r @ k.T @ torch.linalg.inv(a)

    def alphaedit(self, k: Tensor, r: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(self.c0)
        free = vectors[:, values < NULL_SPACE_LIMIT * self.unit]
        p = free @ free.T
        return torch.linalg.solve(p @ (k @ k.T + self.past) + self.ridge, p @ k @ r.T).T

    def emmet(self, k: Tensor, r: Tensor) -> Tensor:
        c = torch.linalg.inv(self.prior * self.c0)
        return r @ torch.linalg.inv(k.T @ c @ k) @ k.T @ c


def close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one.double(), other.double(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_a_sequential_preset_is_the_papers_formula_batch_by_batch(name: str) -> None:
    edited, papers = stream(name), {n: Paper(n) for n in LAYERS}
    for batch in batches():
        deltas = edited.add(batch)
        assert set(deltas) == set(LAYERS)
        for n, delta in deltas.items():
            assert (delta.shape, delta.dtype) == ((HIDDEN, WIDTH), torch.float32)
            assert delta.is_contiguous()
            assert close(delta, papers[n].step(name, *rows(batch, n)))


@pytest.mark.parametrize("name", ["memit", "encore", "alphaedit"])
def test_more_rows_than_the_width_are_the_same_formula(name: str) -> None:
    edited, paper = stream(name), Paper(END)
    for batch in batches(facts=20):
        assert close(edited.add(batch)[END], paper.step(name, *rows(batch, END)))


def test_memit_mass_is_one_solve_of_all_facts_so_far_from_the_base_weights() -> None:
    edited, so_far = stream("memit-mass"), []
    for batch in batches():
        so_far += batch
        for n, delta in edited.add(batch).items():
            assert close(delta, Paper(n).encore(*rows(so_far, n)))


def test_memit_mass_is_the_weights_tier_bit_by_bit() -> None:
    tier, given = WeightsTier(site(), statistics()), batches(count=2, facts=2)
    facts = [terms for batch in given for terms in batch]
    for terms in facts:  # as the store and the tier round them
        for n in LAYERS:
            grid = tier.get_grid(n)
            terms.keys[n].copy_(grid.round_keys(terms.keys[n].bfloat16()))
            terms.residuals[n].copy_(grid.round_residuals(terms.residuals[n]))
    deltas = last(stream("memit-mass"), given)
    served = tier.solve_deltas({f"{n:012x}": pack_terms(terms) for n, terms in enumerate(facts)})
    assert all(torch.equal(deltas[n], served[n]) for n in LAYERS)


def test_only_a_joint_solve_forgets_the_order() -> None:
    given, turned = batches(), [batches()[n] for n in (2, 0, 1)]
    for name, order_matters in (("memit-mass", False), ("memit", True)):
        one, other = last(stream(name), given)[END], last(stream(name), turned)[END]
        assert torch.allclose(one, other, atol=1e-2 if order_matters else 1e-6) != order_matters


def test_sequential_memit_is_the_joint_solve_for_one_batch_and_no_longer_for_two() -> None:
    sequential, joint = stream("memit"), stream("memit-mass", ridge=0.0)
    first, second = batches(2)
    one, other = sequential.add(first), joint.add(first)
    assert all(close(one[n], other[n]) for n in LAYERS)
    one, other = sequential.add(second), joint.add(second)
    assert not any(torch.allclose(one[n], other[n], atol=1e-2) for n in LAYERS)


@every_preset
def test_a_preset_applies_only_the_strengths_that_are_its_own(name: str) -> None:
    usual, ridged, weighted, other_layers = (
        last(stream(name, **changes), batches(2))[END]
        for changes in ({}, {"ridge": 5.0}, {"end_prior": 50.0}, {"prior": 50.0})
    )
    assert close(usual, ridged) == (name in ("memit", "emmet"))
    assert torch.allclose(usual, weighted, atol=1e-4) == (name in ("alphaedit", "emmet"))
    assert torch.equal(usual, other_layers)


def test_encore_protects_the_keys_of_earlier_batches_and_memit_does_not() -> None:
    """Without a ridge, so that only the weight of earlier keys tells the two apart."""
    first, second = batches(2)
    moved = {}
    for name in ("memit", "encore"):
        edited = stream(name, ridge=0.0)
        before, after = edited.add(first), edited.add(second)
        for n in LAYERS:
            old, _ = rows(first, n)
            moved[name, n] = float(((after[n] - before[n]).double() @ old).norm())
    assert all(moved["encore", n] < moved["memit", n] / 2 for n in LAYERS)


def test_past_is_a_weight() -> None:
    edited = PresetStream(
        lambda prior, ridge: SolverSettings(prior, ridge, past_weight=0.25, is_joint=False),
        site(),
        statistics(),
    )
    paper = Paper(END)
    for batch in batches():
        past = paper.past
        assert close(edited.add(batch)[END], paper.step("encore", *rows(batch, END)))
        paper.past = past + 0.25 * (paper.past - past)


def test_alphaedit_leaves_alone_what_ordinary_text_uses() -> None:
    edited = stream("alphaedit")
    for batch in batches():
        for n, delta in edited.add(batch).items():
            used = torch.linalg.eigh(covariance(n).double()).eigenvectors[:, QUIET:]
            assert float((delta.double() @ used).norm()) < 1e-6 * float(delta.norm())
            assert delta.norm() > 1e-2


def test_emmet_meets_every_residual_of_the_last_batch() -> None:
    edited = stream("emmet")
    for batch in batches():
        for n, delta in edited.add(batch).items():
            k, r = rows(batch, n)
            assert float((delta.double() @ k - r).norm()) < 1e-6 * float(delta.norm() * k.norm())


def test_emmet_is_the_least_change_by_its_metric_that_does() -> None:
    solver = RidgeSolver(covariance(END), 2.0, 0.0, equality=True)
    k, r = rows(batches(1)[0], END)
    best, c0 = solver.solve_exact(k.T, r.T), covariance(END).double()
    assert float((best @ k - r).abs().max()) < 1e-6
    unseen = torch.eye(WIDTH).double() - k @ torch.linalg.pinv(k)  # by every key
    for seed in range(5):
        nudge = torch.randn(HIDDEN, WIDTH, generator=torch.Generator().manual_seed(seed)).double()
        other = best + 1e-2 * nudge @ unseen
        assert torch.trace(other @ c0 @ other.T) > torch.trace(best @ c0 @ best.T)


@pytest.mark.parametrize("copies", [2, WIDTH])
def test_emmet_compromises_where_residuals_cannot_all_be_met(copies: int) -> None:
    solver = RidgeSolver(covariance(END), 2.0, 0.0, equality=True)
    keys = fact(1, contexts=1).keys[END][0].repeat(copies, 1)  # (2 · copies, width)
    residuals = torch.randn(len(keys), HIDDEN, generator=torch.Generator().manual_seed(3))
    delta = solver.solve(keys, residuals)
    for n in (0, 1):
        assert torch.allclose(delta @ keys[n], residuals[n::2].mean(0), atol=1e-4)


@every_preset
def test_a_batch_of_nothing_changes_nothing(name: str) -> None:
    edited, other = stream(name), stream(name)
    assert not any(delta.any() for delta in edited.add([]).values())
    first, second = batches(2)
    one, _ = edited.add(first), other.add(first)
    assert all(torch.equal(one[n], delta) for n, delta in edited.add([]).items())
    two = other.add(second)
    assert all(torch.equal(two[n], delta) for n, delta in edited.add(second).items())


@every_preset
@pytest.mark.parametrize(
    ("where", "bad"),
    [("keys", torch.nan), ("keys", torch.inf), ("residuals", torch.nan), ("residuals", 1e42)],
)
def test_what_is_not_finite_in_float32_is_refused_and_leaves_no_trace(
    name: str, where: str, bad: float
) -> None:
    edited, never = stream(name), stream(name)
    first, second = batches(2)
    edited.add(first)
    never.add(first)
    broken = fact(77)
    tensors = {n: tensor.double() for n, tensor in getattr(broken, where).items()}
    tensors[END][0, 0] = bad
    with pytest.raises(KeditError) as caught:
        edited.add([fact(78), replace(broken, **{where: tensors})])
    assert caught.value.code == "non-finite"
    expected = never.add(second)
    assert all(torch.equal(expected[n], delta) for n, delta in edited.add(second).items())


@pytest.mark.parametrize(
    ("c0", "code"), [(torch.eye(WIDTH), "singular"), (covariance(END) * torch.nan, "non-finite")]
)
def test_a_projector_without_a_null_space_is_refused(c0: Tensor, code: str) -> None:
    with pytest.raises(KeditError) as caught:
        RidgeSolver(c0, 0.0, 1.0, projector=NULL_SPACE_LIMIT)
    assert caught.value.code == code


@every_preset
@pytest.mark.parametrize("unit", [2.0**-7, 2.0**7])
def test_a_preset_means_the_same_whatever_unit_the_keys_have(name: str, unit: float) -> None:
    one, other = stream(name), PresetStream(PRESETS[name], site(), statistics(unit))
    for batch in batches(2):
        wide = [replace(t, keys={n: k * unit for n, k in t.keys.items()}) for t in batch]
        expected = one.add(batch)
        for n, delta in other.add(wide).items():
            assert close(delta * unit, expected[n])


def test_switches_that_contradict_each_other_are_refused() -> None:
    for past, equality, joint in ((-1, False, False), (1, False, True), (1, True, False)):
        with pytest.raises(KeditError) as caught:
            SolverSettings(1.0, 0.1, past_weight=past, equality=equality, is_joint=joint)
        assert caught.value.code == "config"
