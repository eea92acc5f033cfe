"""What the spectrum of a matrix tells: how strong and how broad a change is, where it points, and
how alike two sets of activations are. Numbers only; all in float64, of CPU or GPU tensors."""

import torch
from torch import Tensor

TINY = 1e-12  # of the largest: what is smaller is noise


def spectral_norm(matrix: Tensor) -> float:
    """‖M‖₂, the largest singular value of M (m, n)."""
    return float(_singular(matrix)[0])


def stable_rank(matrix: Tensor) -> float:
    """‖M‖_F² / ‖M‖₂² of M (m, n): how many directions share its strength; 0 of nothing."""
    values = _singular(matrix).square()
    return float(values.sum() / values[0]) if values[0] > 0 else 0.0


def effective_rank(matrix: Tensor) -> float:
    """e to the entropy of the singular values' shares (Roy & Vetterli 2007); 0 of nothing."""
    values = _singular(matrix)
    if not values[0] > 0:
        return 0.0
    shares = values[values > TINY * values[0]] / values.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


def top_subspace(matrix: Tensor, count: int) -> Tensor:
    """An orthonormal basis (m, count) of the strongest `count` left singular directions of M
    (m, n): of what it writes."""
    m = matrix.detach().double()
    basis: Tensor = torch.linalg.eigh(m @ m.mT).eigenvectors[:, -count:]
    return basis


def subspace_shift(one: Tensor, other: Tensor) -> float:
    """1 − the mean squared cosine of the principal angles of two orthonormal bases (m, count): 0
    where they span the same, 1 where each is orthogonal to the other."""
    overlap = (one.double().mT @ other.double()).square().sum() / one.shape[1]
    return float((1 - overlap).clamp(0, 1))


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Linear centred kernel alignment (Kornblith et al. 2019, eq. 3) of activations (n, d) and
    (n, e) for the same n inputs: 1 where they differ by a rotation and a scale."""
    x, y = (a.double() - a.double().mean(0) for a in (one, other))
    across = (x.mT @ y).square().sum()
    norms = (x.mT @ x).norm() * (y.mT @ y).norm()
    return float(across / norms) if norms > 0 else 1.0


def _singular(matrix: Tensor) -> Tensor:
    """The singular values of M (m, n), largest first, from the smaller of its Gram matrices."""
    m = matrix.detach().double()
    gram = m @ m.mT if m.shape[0] <= m.shape[1] else m.mT @ m
    values: Tensor = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().flip(0)
    return values
