"""The one ridge solve: the weights as a function of the facts.

    W = W0 + Rᵀ K (A0 + Kᵀ K)⁻¹        A0 = λ C0 + λ_n I

K (facts' keys, width) and R (their residuals v − W0 k, hidden) hold every fact that lives in the
weights, past ones too: MEMIT's normal equations (Meng et al. 2023, eq. 14) over all facts at once,
solved from W0 each time. Adding a fact, replacing it and taking it back are the same operation on
the rows, and the order in which facts came cannot matter.
"""

import torch
from torch import Tensor

from memory.errors import KeditError


class RidgeSolver:
    """One layer's prior, factored once in float64; float32 is wrong here, not just imprecise."""

    def __init__(self, covariance: Tensor, prior: float, ridge: float) -> None:
        """covariance: C0 (width, width). ridge: λ_n in units of E[k²], the mean of C0's diagonal,
        so that it means the same on every model.

        Raises KeditError when A0 is not positive definite.
        """
        c0 = covariance.double().cpu()
        self._a0 = prior * c0
        self._a0.diagonal().add_(ridge * c0.diagonal().mean())
        self._factor = _factored(self._a0)

    def solve(self, keys: Tensor, residuals: Tensor) -> Tensor:
        """ΔW (hidden, width) float32 from keys (n, width) and residuals (n, hidden).

        By Woodbury the cost of fewer rows than the layer is wide is an (n, n) system, not another
        (width, width) factor: (A0 + Kᵀ K)⁻¹ Kᵀ = A0⁻¹ Kᵀ (I + K A0⁻¹ Kᵀ)⁻¹.
        Raises KeditError (code "non-finite") rather than give back NaN or Inf.
        """
        k, r = keys.double().cpu(), residuals.double().cpu()
        if not (torch.isfinite(k).all() and torch.isfinite(r).all()):
            raise KeditError("a key or a target is not finite", code="non-finite")
        if len(k) < k.shape[1]:
            whitened = torch.cholesky_solve(k.T, self._factor)  # A0⁻¹ Kᵀ (width, n)
            gram = k @ whitened  # (n, n)
            gram.diagonal().add_(1.0)
            delta = whitened @ torch.cholesky_solve(r, _factored((gram + gram.T) / 2))
        else:
            delta = torch.cholesky_solve(k.T @ r, _factored(torch.addmm(self._a0, k.T, k)))
        result = delta.T.float().contiguous()
        if not torch.isfinite(result).all():
            raise KeditError("the solve did not give finite weights", code="non-finite")
        return result


def _factored(matrix: Tensor) -> Tensor:
    """The Cholesky factor of a symmetric matrix."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        raise KeditError(
            "the prior λ C0 + λ_n I is not positive definite",
            code="singular",
            hint="raise the site's `ridge`",
        )
    return factor
