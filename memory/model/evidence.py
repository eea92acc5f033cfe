"""Evidence of an audit, in addition to the figures that are judged: spectra of the changes.

Too expensive for every trial of a solve. Ratios and similarities are to the unedited model.
"""

import json
import math
from dataclasses import asdict, dataclass

from torch import Tensor

from memory.canonical_json import to_canonical_json
from memory.model.canary import Canary, CanaryReadings
from memory.model.spectra import (
    effective_rank,
    linear_cka,
    singular_values,
    stable_rank,
    subspace_shift,
    top_singular_directions,
)

WEIGHT_DIRECTIONS = 16  # of a matrix's output that are compared
ACTIVATION_DIRECTIONS = 8  # directions of the activations that are compared, at most
STATEMENTS_PER_DIRECTION = 4  # at least


@dataclass(frozen=True)
class Evidence:
    """Figures by layer: of weights for the edited layers, of activations for every layer.

    A layer that could not be measured is missing; figures of NaN or infinity are NaN.
    """

    spectral_ratio: dict[str, float]  # ‖W‖₂ / ‖W0‖₂
    update_per_root: dict[str, float]  # ‖W − W0‖_F / √facts
    stable_rank: dict[str, float]  # of W − W0
    effective_rank: dict[str, float]  # of W − W0
    weight_shift: dict[str, float]  # of W's strongest output directions; 0 is none, 1 all
    activation_norm: dict[str, float]  # E‖y‖ on the canary's text, as a ratio
    activation_cka: dict[str, float]  # similarity of y at the statements' ends; 1 is equal
    activation_shift: dict[str, float]  # of the principal directions of y there; 0 is none, 1 all

    def as_dict(self) -> dict[str, object]:
        """Convert to JSON values, numbers that are not finite as text."""
        ready: dict[str, object] = json.loads(to_canonical_json(asdict(self)))
        return ready


@dataclass(frozen=True)
class _WeightSpectrum:
    """Spectral figures of an edited matrix and of its change."""

    spectral_ratio: float  # ‖W‖₂ / ‖W0‖₂
    update_norm: float  # ‖W − W0‖_F
    stable_rank: float
    effective_rank: float
    weight_shift: float


class EvidenceCollector:
    """Collector that caches spectra, which cost the most: those of the base once, and those of the
    weights until they change."""

    def __init__(self, canary: Canary) -> None:
        self.canary, self.model = canary, canary.model
        # By layer: the largest singular values of W0 and their left directions.
        self._base_spectra: dict[int, tuple[Tensor, Tensor]] = {}
        self._cached_spectra: tuple[str, dict[str, _WeightSpectrum]] = ("", {})

    def collect_evidence(self, facts: int, weights_hash: str, seen: CanaryReadings) -> Evidence:
        """Collect the evidence of the current model. `facts`: the count in the weights;
        `weights_hash`: of the canary's layers; `seen`: the canary's latest readings."""
        if self._cached_spectra[0] != weights_hash:
            spectra = {str(n): self._compute_spectrum(n) for n in self.canary.layers}
            self._cached_spectra = weights_hash, spectra
        spectra, base = self._cached_spectra[1], self.canary.base_readings
        root = math.sqrt(max(facts, 1))
        similarity, shift = {}, {}
        pairs = zip(base.end_activations, seen.end_activations, strict=True)
        for layer, (before, now) in enumerate(pairs):
            if top := min(ACTIVATION_DIRECTIONS, len(before) // STATEMENTS_PER_DIRECTION):
                similarity[str(layer)] = linear_cka(before, now)
                shift[str(layer)] = subspace_shift(
                    _principal_directions(before, top), _principal_directions(now, top)
                )
        norms = {n: norm for n, norm in base.activation_norms.items() if norm}
        return Evidence(
            spectral_ratio={n: s.spectral_ratio for n, s in spectra.items()},
            update_per_root={n: s.update_norm / root for n, s in spectra.items()},
            stable_rank={n: s.stable_rank for n, s in spectra.items()},
            effective_rank={n: s.effective_rank for n, s in spectra.items()},
            weight_shift={n: s.weight_shift for n, s in spectra.items()},
            activation_norm={str(n): seen.activation_norms[n] / norms[n] for n in norms},
            activation_cka=similarity,
            activation_shift=shift,
        )

    def _compute_spectrum(self, layer: int) -> _WeightSpectrum:
        weight, base = self.model.weight(layer), self.model.base_weight(layer)
        if layer not in self._base_spectra:
            self._base_spectra[layer] = top_singular_directions(base, WEIGHT_DIRECTIONS)
        before, base_directions = self._base_spectra[layer]
        values, directions = top_singular_directions(weight, WEIGHT_DIRECTIONS)
        update = weight - base
        spread = singular_values(update)
        return _WeightSpectrum(
            spectral_ratio=float(values[0] / before[0]),
            update_norm=float(update.norm()),
            stable_rank=stable_rank(spread),
            effective_rank=effective_rank(spread),
            weight_shift=subspace_shift(base_directions, directions),
        )


def _principal_directions(activations: Tensor, count: int) -> Tensor:
    """Return an orthonormal basis (hidden, count) of the principal directions of (n, hidden)."""
    return top_singular_directions((activations - activations.mean(0)).mT, count)[1]
