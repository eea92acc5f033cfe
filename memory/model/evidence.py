"""What an audit writes down beside the figures that are judged: where and how a change points.

Too dear for every trial of a solve. Numbers only; ratios and likenesses are to the unedited model.
"""

import json
import math
from dataclasses import asdict, dataclass

from torch import Tensor

from memory.db.event_log import to_canonical_json
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
ACTIVATION_DIRECTIONS = 8  # directions of the activations that are compared, or fewer:
STATEMENTS_PER_DIRECTION = 4  # statements at least for each of them


@dataclass(frozen=True)
class Evidence:
    """Maps are by layer: of the edited layers, and those of the activations of every layer.

    What could not be measured is missing; what was measured of NaN or infinity is NaN.
    """

    spectral_ratio: dict[str, float]  # ‖W‖₂ / ‖W0‖₂
    update_per_root: dict[str, float]  # ‖W − W0‖_F / √facts
    stable_rank: dict[str, float]  # of W − W0
    effective_rank: dict[str, float]  # of W − W0
    weight_shift: dict[str, float]  # of the strongest directions that W writes; 0 is none, 1 all
    activation_norm: dict[str, float]  # E‖y‖ on the canary's text, as a ratio
    activation_cka: dict[str, float]  # likeness of y at the statements' ends; 1 is alike
    activation_shift: dict[str, float]  # of the principal directions of y there; 0 is none, 1 all

    def as_dict(self) -> dict[str, object]:
        """JSON-ready, numbers that are not finite as text."""
        ready: dict[str, object] = json.loads(to_canonical_json(asdict(self)))
        return ready


@dataclass(frozen=True)
class _WeightSpectrum:
    """An edited matrix and its change, as long as the matrix stays the same."""

    spectral_ratio: float  # ‖W‖₂ / ‖W0‖₂
    update_norm: float  # ‖W − W0‖_F
    stable_rank: float
    effective_rank: float
    weight_shift: float


class EvidenceCollector:
    """Takes the evidence. Spectra cost the most: those of the base are taken at the first time,
    and those of the weights only when they have changed."""

    def __init__(self, canary: Canary) -> None:
        self.canary, self.model = canary, canary.model
        # By layer: the strongest singular values of W0, and what directions it writes with them.
        self._base_spectra: dict[int, tuple[Tensor, Tensor]] = {}
        self._cached_spectra: tuple[str, dict[str, _WeightSpectrum]] = ("", {})

    def collect_evidence(self, facts: int, weights_hash: str, seen: CanaryReadings) -> Evidence:
        """The evidence on the model as it is now. `facts` are in the weights; `weights_hash` is
        `EditableModel.weights_hash` of the canary's layers, and `seen` what the canary saw, now."""
        if self._cached_spectra[0] != weights_hash:
            spectra = {str(n): self._compute_spectrum(n) for n in self.canary.layers}
            self._cached_spectra = weights_hash, spectra
        found, base = self._cached_spectra[1], self.canary.base_readings
        alike, shift = {}, {}
        for layer, (was, now) in enumerate(
            zip(base.end_activations, seen.end_activations, strict=True)
        ):
            if top := min(ACTIVATION_DIRECTIONS, len(was) // STATEMENTS_PER_DIRECTION):
                alike[str(layer)] = linear_cka(was, now)
                shift[str(layer)] = subspace_shift(
                    _principal_directions(was, top), _principal_directions(now, top)
                )
        return Evidence(
            spectral_ratio={n: s.spectral_ratio for n, s in found.items()},
            update_per_root={n: s.update_norm / math.sqrt(max(facts, 1)) for n, s in found.items()},
            stable_rank={n: s.stable_rank for n, s in found.items()},
            effective_rank={n: s.effective_rank for n, s in found.items()},
            weight_shift={n: s.weight_shift for n, s in found.items()},
            activation_norm={
                str(n): seen.activation_norms[n] / was
                for n, was in base.activation_norms.items()
                if was
            },
            activation_cka=alike,
            activation_shift=shift,
        )

    def _compute_spectrum(self, layer: int) -> _WeightSpectrum:
        weight, base = self.model.weight(layer), self.model.base_weight(layer)
        if layer not in self._base_spectra:
            self._base_spectra[layer] = top_singular_directions(base, WEIGHT_DIRECTIONS)
        before, pointed = self._base_spectra[layer]
        values, directions = top_singular_directions(weight, WEIGHT_DIRECTIONS)
        update = weight - base
        spread = singular_values(update)
        return _WeightSpectrum(
            spectral_ratio=float(values[0] / before[0]),
            update_norm=float(update.norm()),
            stable_rank=stable_rank(spread),
            effective_rank=effective_rank(spread),
            weight_shift=subspace_shift(pointed, directions),
        )


def _principal_directions(activations: Tensor, count: int) -> Tensor:
    """An orthonormal basis (hidden, count) of what activations (n, hidden) vary in the most."""
    return top_singular_directions((activations - activations.mean(0)).mT, count)[1]
