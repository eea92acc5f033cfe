"""Spectral figures of matrices: strength, rank and directions of a change, and similarity of two
sets of activations. All in float64, of CPU or GPU tensors; NaN for an input with NaN or infinity.
"""

import math

import torch
from torch import Tensor

NOISE_RATIO = 1e-12  # singular values below this share of the largest are noise


def singular_values(matrix: Tensor) -> Tensor:
    """Compute the singular values of M (m, n), largest first."""
    m = matrix.detach().double()
    gram = m @ m.mT if m.shape[0] <= m.shape[1] else m.mT @ m
    if not gram.isfinite().all():  # torch raises for those
        return torch.full_like(gram[0], math.nan)
    return _descending_roots(torch.linalg.eigvalsh(gram))


def stable_rank(values: Tensor) -> float:
    """Compute ‖M‖_F² / ‖M‖₂² from the singular values of M, largest first: the number of directions
    that share its strength. 0 for a zero matrix."""
    if not values[0] > 0:
        return float(values[0])
    squares = values.square()
    return float(squares.sum() / squares[0])


def effective_rank(values: Tensor) -> float:
    """Compute exp of the entropy of the normalized singular values, largest first (Roy & Vetterli
    2007). 0 for a zero matrix."""
    if not values[0] > 0:
        return float(values[0])
    shares = values[values > NOISE_RATIO * values[0]] / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def top_singular_directions(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` largest singular values of M (m, n), largest first, and an orthonormal
    basis (m, count) of their left directions. Fewer when M is smaller."""
    m = matrix.detach().double()
    wide = m.shape[0] <= m.shape[1]
    gram = m @ m.mT if wide else m.mT @ m
    if not gram.isfinite().all():
        unknown = torch.full_like(gram[0, :count], math.nan)
        return unknown, unknown.expand(len(m), -1)
    squares, vectors = torch.linalg.eigh(gram)
    top = vectors[:, -count:].flip(1)
    return _descending_roots(squares)[:count], top if wide else torch.linalg.qr(m @ top).Q


def subspace_shift(one: Tensor, other: Tensor) -> float:
    """Compute 1 − the mean squared cosine of the principal angles of two orthonormal bases (m,
    count): 0 when they span the same space, 1 when the spaces are orthogonal."""
    overlap = (one.double().mT @ other.double()).square().sum() / one.shape[1]
    return float((1 - overlap).clamp(0, 1))


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Compute the linear centred kernel alignment (Kornblith et al. 2019, eq. 3) of activations
    (n, d) and (n, e) for the same n inputs: 1 when they differ by a rotation and a scale.

    Uses the kernels (n, n), as there are fewer inputs than activations are wide.
    """
    x, y = (a.double() - a.double().mean(0) for a in (one, other))
    kx, ky = x @ x.mT, y @ y.mT
    norms = kx.norm() * ky.norm()
    if norms == 0:  # one of them does not depend on its input
        return float(kx.norm() == ky.norm())
    return float(((kx * ky).sum() / norms).clamp(max=1))


def _descending_roots(squares: Tensor) -> Tensor:
    return squares.clamp(min=0).sqrt().flip(0)
