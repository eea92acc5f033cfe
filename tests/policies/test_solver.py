import pytest
import torch
from torch import Tensor

from memory.errors import KeditError
from policies.solver import RidgeSolver, drop_sink_keys

WIDTH, HIDDEN, FACTS = 40, 12, 7
PRIOR, RIDGE = 0.3, 0.02


def covariance(rank: int = 25) -> Tensor:
    """As of ordinary text: without weight in some directions, so that the ridge matters."""
    keys = torch.randn(rank, WIDTH, generator=torch.Generator().manual_seed(1))
    return keys.T @ keys / rank


def prior() -> Tensor:
    """A0 = λ C0 + λ_n I, the ridge in units of the mean of C0's diagonal."""
    c0 = covariance().double()
    return PRIOR * c0 + RIDGE * float(c0.trace()) / WIDTH * torch.eye(WIDTH).double()


def terms(facts: int = FACTS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    keys = torch.randn(facts, WIDTH, generator=generator)
    return keys, torch.randn(facts, HIDDEN, generator=generator)


def dense(keys: Tensor, residuals: Tensor) -> Tensor:
    a = prior()
    k, r = keys.double(), residuals.double()
    return r.T @ k @ torch.linalg.inv(a + k.T @ k)


@pytest.fixture
def solver() -> RidgeSolver:
    return RidgeSolver(covariance(), PRIOR, RIDGE)


@pytest.mark.parametrize("facts", [1, FACTS, 3 * WIDTH])
def test_it_is_the_plain_dense_solve(solver: RidgeSolver, facts: int) -> None:
    keys, residuals = terms(facts)
    delta = solver.solve(keys, residuals)
    assert (delta.shape, delta.dtype) == ((HIDDEN, WIDTH), torch.float32)
    assert delta.is_contiguous()
    assert torch.allclose(delta.double(), dense(keys, residuals), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("facts", [WIDTH - 1, WIDTH, WIDTH + 5])
def test_either_way_to_solve_gives_the_plain_dense_inverse(solver: RidgeSolver, facts: int) -> None:
    keys, residuals = terms(facts)
    expected = dense(keys, residuals)
    assert float((solver.solve(keys, residuals) - expected).abs().max()) < 1e-6
    assert float(expected.abs().max()) > 0.1


def test_the_two_ways_to_solve_meet(solver: RidgeSolver) -> None:
    """Rows of nothing change nothing, but there are then as many rows as the layer is wide."""
    keys, residuals = terms(WIDTH - 1)
    nothing = torch.zeros(1, WIDTH), torch.zeros(1, HIDDEN)
    padded = solver.solve(torch.cat([keys, nothing[0]]), torch.cat([residuals, nothing[1]]))
    assert torch.allclose(padded, solver.solve(keys, residuals), rtol=0, atol=1e-6)


def test_solving_leaves_no_trace_in_the_solver(solver: RidgeSolver) -> None:
    few, many = terms(3), terms(WIDTH + 5)
    first = [solver.solve(*few), solver.solve(*many)]
    assert torch.equal(solver.solve(*few), first[0])
    assert torch.equal(solver.solve(*many), first[1])


def test_it_minimises_what_it_says(solver: RidgeSolver) -> None:
    keys, residuals = terms()
    a = prior()

    def cost(delta: Tensor) -> float:
        error = keys.double() @ delta.T - residuals.double()
        return float(error.square().sum() + torch.trace(delta @ a @ delta.T))

    best = solver.solve(keys, residuals).double()
    for seed in range(5):
        nudge = torch.randn(HIDDEN, WIDTH, generator=torch.Generator().manual_seed(seed)).double()
        assert cost(best + 1e-3 * nudge) > cost(best)


@pytest.mark.parametrize("unit", [1e-4, 1e4])
def test_the_ridge_means_the_same_whatever_unit_the_keys_have(
    solver: RidgeSolver, unit: float
) -> None:
    keys, residuals = terms()
    other = RidgeSolver(covariance() * unit**2, PRIOR, RIDGE).solve(keys * unit, residuals)
    assert torch.allclose(other * unit, solver.solve(keys, residuals), rtol=1e-4, atol=1e-6)


def test_the_order_of_facts_does_not_matter(solver: RidgeSolver) -> None:
    keys, residuals = terms()
    turn = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    again = solver.solve(keys[turn], residuals[turn])
    assert torch.allclose(again, solver.solve(keys, residuals), rtol=1e-5, atol=1e-7)


def test_a_fact_taken_out_leaves_no_trace(solver: RidgeSolver) -> None:
    keys, residuals = terms()
    never = solver.solve(keys[:-1], residuals[:-1])
    with_it = solver.solve(keys, residuals)
    assert not torch.allclose(with_it, never, atol=1e-3)
    assert torch.equal(solver.solve(keys[:-1], residuals[:-1]), never)


def test_a_residual_of_nothing_changes_nothing(solver: RidgeSolver) -> None:
    keys, residuals = terms()
    assert not solver.solve(keys, torch.zeros_like(residuals)).any()


def test_the_weaker_the_prior_the_nearer_the_targets() -> None:
    keys, residuals = terms()
    errors = [
        float(
            (
                keys @ RidgeSolver(covariance(), p, p / 10).solve(keys, residuals).T - residuals
            ).norm()
        )
        for p in (10.0, 1.0, 0.1, 1e-4)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2 * float(residuals.norm())


def test_two_facts_with_one_key_meet_in_the_middle() -> None:
    keys, residuals = terms(2)
    keys[1] = keys[0]
    delta = RidgeSolver(covariance(), 1e-8, 1e-6).solve(keys, residuals)
    assert torch.allclose(delta @ keys[0], residuals.mean(0), atol=1e-4)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("facts", [FACTS, WIDTH + 5])
def test_terms_that_are_not_finite_are_refused(
    solver: RidgeSolver, bad: float, where: int, facts: int
) -> None:
    pair = terms(facts)
    pair[where][2, 3] = bad
    with pytest.raises(KeditError) as caught:
        solver.solve(*pair)
    assert caught.value.code == "non-finite"


def test_weights_beyond_float32_are_refused(solver: RidgeSolver) -> None:
    keys, residuals = terms()
    with pytest.raises(KeditError) as caught:
        solver.solve(keys * 1e-3, residuals.double() * 1e42)
    assert caught.value.code == "non-finite"


@pytest.mark.parametrize(
    ("c0", "ridge"), [(covariance(), -1.0), (-covariance(), 0.0), (covariance() * torch.nan, 1.0)]
)
def test_a_prior_without_a_solution_is_refused(c0: Tensor, ridge: float) -> None:
    with pytest.raises(KeditError) as caught:
        RidgeSolver(c0, PRIOR, ridge)
    assert caught.value.code == "singular"
    assert "ridge" in caught.value.hint


def test_the_key_of_a_sink_is_left_alone() -> None:
    keys, residuals = terms()
    sink = 300 * torch.nn.functional.normalize(keys[0] + keys[1], dim=0)
    free = RidgeSolver(covariance(), PRIOR, RIDGE).solve(keys, residuals)
    held = RidgeSolver(covariance(), PRIOR, RIDGE, sink_key=sink).solve(keys, residuals)
    assert (held @ sink).norm() < 0.01 * (free @ sink).norm()
    # A short one is held as firmly as usual keys are.
    short = RidgeSolver(covariance(), PRIOR, RIDGE, sink_key=sink / 3000).solve(keys, residuals)
    assert (short @ sink).norm() < 0.5 * (free @ sink).norm()
    same = RidgeSolver(covariance(), PRIOR, RIDGE, sink_key=torch.empty(0)).solve(keys, residuals)
    assert torch.equal(same, free)


def test_contexts_at_a_sink_are_dropped() -> None:
    sink, other = terms(2)[0]
    keys = torch.stack([0.1 * sink, other, -sink])[:, None]  # (contexts, sites, width)
    assert torch.equal(drop_sink_keys(keys, sink), keys[1:])
    assert torch.equal(drop_sink_keys(keys, torch.empty(0)), keys)


def test_keys_that_look_like_the_sink_in_every_context_are_not_dropped() -> None:
    sink = torch.ones(WIDTH)
    keys = (sink + 0.5 * terms(5)[0])[:, None]  # as of a layer whose activations are positive
    assert float(torch.cosine_similarity(keys, sink, dim=-1).min()) > 0.8
    assert torch.equal(drop_sink_keys(keys, sink), keys)
