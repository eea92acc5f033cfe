import math

import pytest
import torch

from memory.spectra import (
    effective_rank,
    linear_cka,
    spectral_norm,
    stable_rank,
    subspace_shift,
    top_subspace,
)


def made_of(*values: float, tall: bool = False) -> torch.Tensor:
    """A matrix (6, 9), or (9, 6), with these singular values and random directions."""
    generator = torch.Generator().manual_seed(1)
    left = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(9, 9, generator=generator, dtype=torch.float64)).Q
    n = len(values)
    matrix = left[:, :n] @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right[:, :n].T
    return matrix.T if tall else matrix


@pytest.mark.parametrize("tall", [False, True])
def test_strength_and_breadth_follow_from_the_singular_values(tall: bool) -> None:
    one = made_of(3.0, tall=tall)
    assert spectral_norm(one) == pytest.approx(3.0)
    assert (stable_rank(one), effective_rank(one)) == (pytest.approx(1), pytest.approx(1))
    even = made_of(2.0, 2.0, 2.0, 2.0, tall=tall)
    assert (stable_rank(even), effective_rank(even)) == (pytest.approx(4), pytest.approx(4))
    uneven = made_of(4.0, 2.0, tall=tall)
    assert stable_rank(uneven) == pytest.approx(1.25)  # (16 + 4) / 16
    shares = (2 / 3, 1 / 3)
    assert effective_rank(uneven) == pytest.approx(math.exp(-sum(s * math.log(s) for s in shares)))


def test_nothing_has_no_rank() -> None:
    nothing = torch.zeros(4, 5)
    assert (spectral_norm(nothing), stable_rank(nothing), effective_rank(nothing)) == (0, 0, 0)


def test_a_subspace_is_what_is_written_strongest() -> None:
    matrix = torch.zeros(5, 7)
    matrix[3, 0], matrix[1, 2], matrix[0, 4] = 5.0, -4.0, 0.5
    basis = top_subspace(matrix, 2)
    assert basis.shape == (5, 2)
    kept = (basis @ basis.T).diagonal()
    assert kept.tolist() == pytest.approx([0, 1, 0, 1, 0], abs=1e-9)


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
