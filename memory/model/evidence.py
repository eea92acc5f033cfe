"""What an audit writes down beside the figures that are judged: where and how a change points.

Too dear for every trial of a solve. Numbers only; ratios and likenesses are to the unedited model.
"""

import json
import math
from dataclasses import asdict, dataclass

from torch import Tensor

from memory.db.event_log import canonical
from memory.model.canary import Canary, Seen
from memory.model.spectra import (
    effective_rank,
    linear_cka,
    singular_values,
    stable_rank,
    strongest,
    subspace_shift,
)

DIRECTIONS = 16  # of a matrix's output that are compared
ACTIVE = 8  # directions of the activations that are compared, or fewer:
EACH = 4  # statements at least for each of them


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
        ready: dict[str, object] = json.loads(canonical(asdict(self)))
        return ready


@dataclass(frozen=True)
class _Spectrum:
    """An edited matrix and its change, as long as the matrix stays the same."""

    strength: float  # ‖W‖₂ / ‖W0‖₂
    update: float  # ‖W − W0‖_F
    stable: float
    effective: float
    shift: float


class Examiner:
    """Takes the evidence. Spectra cost the most: those of the base are taken at the first time,
    and those of the weights only when they have changed."""

    def __init__(self, canary: Canary) -> None:
        self.canary, self.model = canary, canary.model
        # By layer: the strongest singular values of W0, and what directions it writes with them.
        self._base: dict[int, tuple[Tensor, Tensor]] = {}
        self._known: tuple[str, dict[str, _Spectrum]] = ("", {})

    def take(self, facts: int, weights_hash: str, seen: Seen) -> Evidence:
        """The evidence on the model as it is now. `facts` are in the weights; `weights_hash` is
        `EditableModel.weights_hash` of the canary's layers, and `seen` what the canary saw, now."""
        if self._known[0] != weights_hash:
            spectra = {str(n): self._spectrum(n) for n in self.canary.layers}
            self._known = weights_hash, spectra
        found, base = self._known[1], self.canary.baseline
        alike, shift = {}, {}
        for layer, (was, now) in enumerate(zip(base.ends, seen.ends, strict=True)):
            if top := min(ACTIVE, len(was) // EACH):
                alike[str(layer)] = linear_cka(was, now)
                shift[str(layer)] = subspace_shift(_principal(was, top), _principal(now, top))
        return Evidence(
            spectral_ratio={n: s.strength for n, s in found.items()},
            update_per_root={n: s.update / math.sqrt(max(facts, 1)) for n, s in found.items()},
            stable_rank={n: s.stable for n, s in found.items()},
            effective_rank={n: s.effective for n, s in found.items()},
            weight_shift={n: s.shift for n, s in found.items()},
            activation_norm={str(n): seen.norms[n] / was for n, was in base.norms.items() if was},
            activation_cka=alike,
            activation_shift=shift,
        )

    def _spectrum(self, layer: int) -> _Spectrum:
        weight, base = self.model.weight(layer), self.model.base_weight(layer)
        if layer not in self._base:
            self._base[layer] = strongest(base, DIRECTIONS)
        before, pointed = self._base[layer]
        values, directions = strongest(weight, DIRECTIONS)
        update = weight - base
        spread = singular_values(update)
        return _Spectrum(
            strength=float(values[0] / before[0]),
            update=float(update.norm()),
            stable=stable_rank(spread),
            effective=effective_rank(spread),
            shift=subspace_shift(pointed, directions),
        )


def _principal(activations: Tensor, count: int) -> Tensor:
    """An orthonormal basis (hidden, count) of what activations (n, hidden) vary in the most."""
    return strongest((activations - activations.mean(0)).mT, count)[1]
