"""What the spectrum of a matrix tells: how strong and how broad a change is, where it points, and
how alike two sets of activations are. Numbers only; all in float64, of CPU or GPU tensors; where a
number given is NaN or infinite, NaN."""

import math

import torch
from torch import Tensor

NOISE_RATIO = 1e-12  # of the largest: what is smaller is noise


def singular_values(matrix: Tensor) -> Tensor:
    """The singular values of M (m, n), largest first."""
    m = matrix.detach().double()
    gram = m @ m.mT if m.shape[0] <= m.shape[1] else m.mT @ m
    if not gram.isfinite().all():  # torch refuses those
        return torch.full_like(gram[0], math.nan)
    return _descending_roots(torch.linalg.eigvalsh(gram))


def stable_rank(values: Tensor) -> float:
    """‖M‖_F² / ‖M‖₂² from the singular values of M, largest first: how many directions share its
    strength; 0 of nothing."""
    if not values[0] > 0:
        return float(values[0])
    squares = values.square()
    return float(squares.sum() / squares[0])


def effective_rank(values: Tensor) -> float:
    """e to the entropy of the shares of the singular values, largest first (Roy & Vetterli 2007);
    0 of nothing."""
    if not values[0] > 0:
        return float(values[0])
    shares = values[values > NOISE_RATIO * values[0]] / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def top_singular_directions(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest `count` singular values of M (m, n), largest first, and an orthonormal basis
    (m, count) of their left directions: of what M writes. Fewer where M is smaller."""
    m = matrix.detach().double()
    wide = m.shape[0] <= m.shape[1]
    gram = m @ m.mT if wide else m.mT @ m
    if not gram.isfinite().all():
        nothing = torch.full_like(gram[0, :count], math.nan)
        return nothing, nothing.expand(len(m), -1)
    squares, vectors = torch.linalg.eigh(gram)
    top = vectors[:, -count:].flip(1)
    return _descending_roots(squares)[:count], top if wide else torch.linalg.qr(m @ top).Q


def subspace_shift(one: Tensor, other: Tensor) -> float:
    """1 − the mean squared cosine of the principal angles of two orthonormal bases (m, count): 0
    where they span the same, 1 where each is orthogonal to the other."""
    overlap = (one.double().mT @ other.double()).square().sum() / one.shape[1]
    return float((1 - overlap).clamp(0, 1))


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019, eq. 3) of activations (n, d) and
    (n, e) for the same n inputs: 1 where they differ by a rotation and a scale.

    By the inputs' likenesses (n, n), as there are fewer inputs than activations are wide.
    """
    x, y = (a.double() - a.double().mean(0) for a in (one, other))
    kx, ky = x @ x.mT, y @ y.mT
    norms = kx.norm() * ky.norm()
    if norms == 0:  # one of them says nothing of its input
        return float(kx.norm() == ky.norm())
    return float(((kx * ky).sum() / norms).clamp(max=1))


def _descending_roots(squares: Tensor) -> Tensor:
    return squares.clamp(min=0).sqrt().flip(0)
