"""The one ridge solve: the weights as a function of the facts.

    W = W0 + Rᵀ K (A0 + Kᵀ K)⁻¹        A0 = λ C0 + λ_n I + s sᵀ

K (facts' keys, width) and R (their residuals v − W0 k, hidden) hold every fact that lives in the
weights, past ones too: MEMIT's normal equations (Meng et al. 2023, eq. 14) over all facts at once,
solved from W0 each time. Adding a fact, replacing it and taking it back are the same operation on
the rows, and the order in which facts came cannot matter.

s is the key of the attention sink, no shorter than usual keys. Without it, an edit of the layers
that write the sink (its key may be 400 times as long as others) changes it in every text, and the
perplexity of a model of 30 layers was multiplied by 3 to 14.

The same solve gives the published methods that the bench compares with, by what its presets pass
in: other rows, other weights of the prior, and here the two switches that change the solve itself,
AlphaEdit's projector (Fang et al. 2025) and EMMET's equality (Gupta et al. 2024).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from memory.errors import NotFinite, Singular

# Cosines with the sink's key: from the first on a key may be the sink's own, below the second it is
# not. SmolLM2's are above .7 where the subject is a sink, and below .1 elsewhere.
SINK_COSINE, OTHER_COSINE = 0.7, 0.35
SAME_KEYS_RCOND = 1e-6  # of the largest singular value: smaller ones are noise in float32 keys


def stack_facts(facts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return keys (n, width) and residuals (n, hidden) of one layer, a row for each context and
    site, from the facts' keys (contexts, sites, width) and residuals (sites, hidden)."""
    keys = torch.cat([k.flatten(0, 1) for k, _ in facts])
    return keys, torch.cat([r.repeat(len(k), 1) for k, r in facts])


def drop_sink_keys(keys: Tensor, sink_key: Tensor) -> Tensor:
    """Return a fact's keys (contexts, sites, width) without contexts whose key is the sink's, while
    that in another context is not.

    Where the subject's last token is an attention sink, its key is that of all other texts' first
    tokens: a residual there would be added to every text.
    """
    if not len(sink_key):
        return keys
    cosines = torch.cosine_similarity(keys.float(), sink_key.to(keys.device), dim=-1)
    highest = cosines.flatten(1).amax(1)  # (contexts,)
    is_sink = (highest > SINK_COSINE) & (highest.amin() < OTHER_COSINE)
    return keys[~is_sink]


class RidgeSolver:
    """One layer's prior, factored once in float64; float32 is wrong here, not just imprecise."""

    def __init__(
        self,
        covariance: Tensor,
        prior: float,
        ridge: float,
        projector: float | None = None,
        equality: bool = False,
        sink_key: Tensor | None = None,
    ) -> None:
        """covariance: C0 (width, width). ridge: λ_n in units of E[k²], the mean of C0's diagonal,
        so that it means the same on every model. sink_key: (width,), or empty for none.

        projector: if given, weights change only along C0's eigenvectors whose eigenvalue is below
        it, in units of E[k²] too; K is then K U0 and C0 is U0ᵀ C0 U0 in all formulas, U0 (width,
        free). equality: match the residuals at any cost in A0, rather than weigh the two.
        Raises KeditError when A0 is not positive definite, or no direction is left.
        """
        c0 = covariance.double().cpu()
        unit = float(c0.diagonal().mean())
        self.width, self.key_size = len(c0), unit**0.5
        """Width of the layer, and the size of a typical entry of a key."""
        self._basis = None if projector is None else _find_null_space(c0, projector * unit)
        self._equality, self._covariance = equality, covariance
        self._prior, self._ridge, self._sink_key = prior, ridge, sink_key
        self._cholesky = _factor_matrix(self._make_a0())

    def _make_a0(self) -> Tensor:
        """Make A0 (width, width) in float64. It is not kept: few solves need more than its
        factor."""
        c0 = self._covariance.double().cpu()
        a0 = self._prior * (c0 if self._basis is None else self._basis.T @ c0 @ self._basis)
        a0.diagonal().add_(self._ridge * c0.diagonal().mean())
        if self._sink_key is not None and len(self._sink_key):
            sink = self._sink_key.double().cpu()
            sink = sink * (c0.trace().sqrt() / sink.norm()).clamp(min=1.0)  # E‖k‖² = tr C0
            a0.addr_(sink, sink)
        return a0

    def solve(self, keys: Tensor, residuals: Tensor) -> Tensor:
        """Solve ΔW (hidden, width) in float32 from keys (n, width) and residuals (n, hidden).

        Raises NotFinite rather than return NaN or Inf.
        """
        return narrow_to_float32(self.solve_exact(keys, residuals))

    def solve_exact(self, keys: Tensor, residuals: Tensor) -> Tensor:
        """Solve ΔW as `solve` does, in float64 and unchecked."""
        k, r = keys.double().cpu(), residuals.double().cpu()
        if not (torch.isfinite(k).all() and torch.isfinite(r).all()):
            raise NotFinite("a key or a target is not finite")
        if self._basis is not None:
            k = k @ self._basis  # (n, free)
        delta = self._solve_equality(k, r) if self._equality else self._solve_ridge(k, r)
        return (delta if self._basis is None else self._basis @ delta).T

    def solve_sums(self, gram: Tensor, cross: Tensor) -> Tensor:
        """Solve ΔW (hidden, width) in float32 from KᵀK (width, width) and KᵀR (width, hidden),
        without a projector or equality.

        Raises NotFinite rather than return NaN or Inf.
        """
        if not (torch.isfinite(gram).all() and torch.isfinite(cross).all()):
            raise NotFinite("a key or a target is not finite")
        return narrow_to_float32(
            torch.cholesky_solve(cross, _factor_matrix(self._make_a0().add_(gram))).T
        )

    def _solve_ridge(self, k: Tensor, r: Tensor) -> Tensor:
        """Solve for the ΔWᵀ (width, hidden) that minimises ‖K ΔWᵀ − R‖² + tr(ΔW A0 ΔWᵀ).

        By Woodbury the cost of fewer rows than the layer is wide is an (n, n) system, not another
        (width, width) factor: (A0 + Kᵀ K)⁻¹ Kᵀ = A0⁻¹ Kᵀ (I + K A0⁻¹ Kᵀ)⁻¹.
        """
        if len(k) < k.shape[1]:
            whitened = torch.cholesky_solve(k.T, self._cholesky)  # A0⁻¹ Kᵀ (width, n)
            gram = k @ whitened  # (n, n)
            gram.diagonal().add_(1.0)
            return whitened @ torch.cholesky_solve(r, _factor_matrix((gram + gram.T) / 2))
        return torch.cholesky_solve(k.T @ r, _factor_matrix(torch.addmm(self._make_a0(), k.T, k)))

    def _solve_equality(self, k: Tensor, r: Tensor) -> Tensor:
        """Solve for the ΔWᵀ (width, hidden) that minimises tr(ΔW A0 ΔWᵀ) subject to K ΔWᵀ = R.

        That is A0⁻¹ Kᵀ (K A0⁻¹ Kᵀ)⁻¹ R, as the shortest least-squares solution in coordinates in
        which A0 = L Lᵀ is the identity: it is defined, and a compromise, also where keys repeat
        or outnumber the width and no ΔW can meet them all.
        """
        whitened = torch.linalg.solve_triangular(self._cholesky, k.T, upper=False).T  # K L⁻ᵀ
        shortest = torch.linalg.lstsq(whitened, r, rcond=SAME_KEYS_RCOND, driver="gelsd").solution
        delta: Tensor = torch.linalg.solve_triangular(self._cholesky.T, shortest, upper=True)
        return delta


def narrow_to_float32(delta: Tensor) -> Tensor:
    """Return ΔW in float32; raises NotFinite when it does not fit there."""
    result = delta.float().contiguous()
    if not torch.isfinite(result).all():
        raise NotFinite("the solve did not give finite weights")
    return result


def _find_null_space(covariance: Tensor, limit: float) -> Tensor:
    """Return U0 (width, free), the eigenvectors of C0 whose eigenvalue is below the limit."""
    if not torch.isfinite(covariance).all():
        raise NotFinite("the key covariance is not finite")
    values, vectors = torch.linalg.eigh(covariance)
    free: Tensor = vectors[:, values < limit]
    if not free.shape[1]:
        raise Singular(
            "no direction of the key covariance is below the projector's threshold",
            hint="choose a preset without a projector",
        )
    return free


def _factor_matrix(matrix: Tensor) -> Tensor:
    """Return the Cholesky factor of a symmetric matrix; raises Singular."""
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info) != 0:
        raise Singular(
            "the prior λ C0 + λ_n I is not positive definite",
            hint="raise the site's `ridge`, or choose a preset that has one",
        )
    return factor
