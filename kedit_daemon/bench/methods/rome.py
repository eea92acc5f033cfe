"""ROME and r-ROME: one layer, one fact at a time, and the residual met exactly.

ROME (Meng et al. 2022, eq. 2) adds ΔW = (v* − W k) uᵀ / (uᵀ k) with u = C0⁻¹ k. Its code takes u
from a key k̄ averaged over contexts and the rest from the bare prompt's key k. Where u is nearly at
right angles to k the update explodes: Gupta et al. 2024 ("Rebuilding ROME") call such edits
disabling, and take k̄ throughout. k̄ is averaged as for MEMIT here: the bare prompt's key has half
the weight.
"""

import torch
from torch import Tensor

from kedit_daemon.bench.methods.reference_memit import (
    RIDGE_FLOOR,
    ContextBatch,
    ReferenceMemit,
)


class Rome(ReferenceMemit):
    """ROME at the last of the site's layers. As published, targets have no end-of-text token."""

    def choose_layers(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        return layers[-1:]

    def update_layers(self, batch: ContextBatch, target: Tensor) -> bool:
        """Move the layer's output by v* − W k at the key k. Return False if a number is not
        finite."""
        (layer,) = self.layers
        keys = self.read_keys(layer, batch)
        direction = self._whiten_key(layer, self.average_keys(keys))
        residual = target - self.read_residual(batch)  # v* − W k: the rest of the stream cancels
        reach = direction.dot(self.choose_key(keys).double().cpu())  # uᵀ k
        update = torch.outer(residual.double().cpu(), direction) / reach
        if not torch.isfinite(update).all():
            return False
        self.add_updates({layer: update})
        return True

    def _whiten_key(self, layer: int, key: Tensor) -> Tensor:
        """Return u = C0⁻¹ k̄ (width,), in float64."""
        covariance = self.loaded_model.statistics[layer].covariance.double().cpu()
        covariance.diagonal().add_(RIDGE_FLOOR * covariance.diagonal().mean())
        direction: Tensor = torch.linalg.solve(covariance, key.double().cpu())
        return direction

    def choose_key(self, keys: Tensor) -> Tensor:
        """Choose the key (width,) at which the residual is met: the bare prompt's."""
        return keys[0]


class RevisedRome(Rome):
    """r-ROME: one averaged key throughout."""

    def choose_key(self, keys: Tensor) -> Tensor:
        return self.average_keys(keys)
