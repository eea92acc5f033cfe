import math

import pytest
import torch

from memory.model.spectra import (
    effective_rank,
    linear_cka,
    singular_values,
    stable_rank,
    subspace_shift,
    top_singular_directions,
)


def made_of(*values: float, tall: bool = False) -> torch.Tensor:
    """A matrix (6, 9), or (9, 6), with these singular values and random directions."""
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(9, 9, generator=generator, dtype=torch.float64)).Q
    n = len(values)
    matrix = left[:, :n] @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right[:, :n].T
    return matrix.T if tall else matrix


def ranks(matrix: torch.Tensor) -> tuple[float, float]:
    values = singular_values(matrix)
    return stable_rank(values), effective_rank(values)


@pytest.mark.parametrize("tall", [False, True])
def test_breadth_follows_from_the_singular_values(tall: bool) -> None:
    assert ranks(made_of(3.0, tall=tall)) == (pytest.approx(1), pytest.approx(1))
    assert ranks(made_of(2.0, 2.0, 2.0, 2.0, tall=tall)) == (pytest.approx(4), pytest.approx(4))
    uneven = made_of(4.0, 2.0, tall=tall)
    assert singular_values(uneven)[:2].tolist() == pytest.approx([4, 2])
    shares = (2 / 3, 1 / 3)
    entropy = -sum(s * math.log(s) for s in shares)
    assert ranks(uneven) == (pytest.approx(1.25), pytest.approx(math.exp(entropy)))  # (16 + 4) / 16


def test_nothing_has_no_rank() -> None:
    assert ranks(torch.zeros(4, 5)) == (0, 0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("shape", [(4, 5), (5, 4)])
def test_what_is_not_finite_gives_nan_and_no_error(shape: tuple[int, int], bad: float) -> None:
    matrix = torch.ones(shape)
    matrix[1, 2] = bad
    values, basis = top_singular_directions(matrix, 2)
    assert (values.shape, basis.shape) == ((2,), (shape[0], 2))
    shift = subspace_shift(basis, torch.eye(shape[0])[:, :2])
    figures = (*ranks(matrix), float(values[0]), shift, linear_cka(matrix, torch.eye(*shape)))
    assert all(math.isnan(n) for n in figures)


@pytest.mark.parametrize("tall", [False, True])
def test_a_subspace_is_what_is_written_strongest(tall: bool) -> None:
    matrix = torch.zeros(5, 4 if tall else 7)
    matrix[3, 0], matrix[1, 2], matrix[0, 3] = 5.0, -4.0, 0.5
    values, basis = top_singular_directions(matrix, 2)
    assert values.tolist() == pytest.approx([5, 4])
    assert basis.abs().tolist() == [pytest.approx(row) for row in torch.eye(5)[:, [3, 1]].tolist()]


@pytest.mark.parametrize("tall", [False, True])
def test_a_basis_is_orthonormal_also_where_fewer_directions_are_written(tall: bool) -> None:
    values, basis = top_singular_directions(made_of(3.0, tall=tall), 4)
    assert values.tolist() == pytest.approx([3, 0, 0, 0], abs=1e-6)
    assert torch.allclose(basis.mT @ basis, torch.eye(4, dtype=torch.float64), atol=1e-9)
    assert top_singular_directions(torch.eye(3), 5)[1].shape == (3, 3)


def test_a_shift_is_the_share_of_the_directions_that_left() -> None:
    axes = torch.eye(6)
    assert subspace_shift(axes[:, :2], axes[:, [1, 0]]) == 0
    assert subspace_shift(axes[:, :2], axes[:, 2:4]) == 1
    assert subspace_shift(axes[:, :2], axes[:, 1:3]) == pytest.approx(0.5)
    turned = torch.stack([(axes[0] + axes[4]) / math.sqrt(2), axes[1]], dim=1)
    assert subspace_shift(axes[:, :2], turned) == pytest.approx(0.25)


def test_activations_are_alike_up_to_a_rotation_a_scale_and_a_place() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(200, 8, generator=generator)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    assert linear_cka(x, 3 * x @ turn + 5) == pytest.approx(1, abs=1e-6)
    other = torch.randn(200, 8, generator=generator)
    assert linear_cka(x, other) < 0.1
    assert linear_cka(x, other) < linear_cka(x, x + other) < 1
    assert linear_cka(torch.ones(4, 3), torch.ones(4, 3)) == 1


def test_an_answer_that_no_longer_depends_on_the_input_is_not_alike() -> None:
    x = torch.randn(20, 8, generator=torch.Generator().manual_seed(3))
    assert linear_cka(x, torch.ones(20, 8)) == 0
