"""What an audit writes down beside the figures that are judged: where and how a change points.

Too dear for every trial of a solve. Numbers only; ratios and likenesses are to the unedited model.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch import Tensor

from memory.health import Canary
from memory.ledger import canonical
from memory.spectra import (
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
class _Base:
    """The unedited model."""

    strengths: dict[int, float]  # ‖W0‖₂ of the edited layers
    directions: dict[int, Tensor]  # the strongest (hidden, DIRECTIONS) that W0 writes
    norms: dict[int, float]
    ends: list[Tensor]  # of each layer (statements, hidden)


@dataclass(frozen=True)
class _Spectrum:
    """An edited matrix and its change, as long as the matrix stays the same."""

    strength: float  # ‖W‖₂ / ‖W0‖₂
    update: float  # ‖W − W0‖_F
    stable: float
    effective: float
    shift: float


class Examiner:
    """Takes the evidence. What is needed of the unedited model is read at the first time; spectra
    are taken again only when the weights have changed, as they cost the most."""

    def __init__(self, canary: Canary) -> None:
        self.canary, self.model = canary, canary.model
        self._base: _Base | None = None
        self._known: tuple[str, dict[str, _Spectrum]] = ("", {})

    def take(self, facts: int, weights_hash: str) -> Evidence:
        """The evidence on the model as it is now. `facts` are in the weights, and `weights_hash`
        is `EditableModel.weights_hash` of the canary's layers, now."""
        if self._base is None:
            self._base = self._read_base()
        base = self._base
        if self._known[0] != weights_hash:
            spectra = {str(n): self._spectrum(n, base) for n in self.canary.layers}
            self._known = weights_hash, spectra
        found = self._known[1]
        norms, _ = self.canary.read(range(self.model.layers))
        alike, shift = {}, {}
        for layer, (was, now) in enumerate(zip(base.ends, self._ends(), strict=True)):
            if top := min(ACTIVE, len(was) // EACH):
                alike[str(layer)] = linear_cka(was, now)
                shift[str(layer)] = subspace_shift(_principal(was, top), _principal(now, top))
        return Evidence(
            spectral_ratio={n: s.strength for n, s in found.items()},
            update_per_root={n: s.update / math.sqrt(max(facts, 1)) for n, s in found.items()},
            stable_rank={n: s.stable for n, s in found.items()},
            effective_rank={n: s.effective for n, s in found.items()},
            weight_shift={n: s.shift for n, s in found.items()},
            activation_norm={str(n): norms[n] / was for n, was in base.norms.items() if was},
            activation_cka=alike,
            activation_shift=shift,
        )

    def _read_base(self) -> _Base:
        strengths, directions = {}, {}
        for layer in self.canary.layers:
            values, directions[layer] = strongest(self.model.base_weight(layer), DIRECTIONS)
            strengths[layer] = float(values[0])
        with self.model.at_base():
            norms, _ = self.canary.read(range(self.model.layers))
            return _Base(strengths, directions, norms, list(self._ends()))

    def _spectrum(self, layer: int, base: _Base) -> _Spectrum:
        weight = self.model.weight(layer)
        update = weight - self.model.base_weight(layer)
        values, directions = strongest(weight, DIRECTIONS)
        spread = singular_values(update)
        return _Spectrum(
            strength=float(values[0]) / base.strengths[layer],
            update=float(update.norm()),
            stable=stable_rank(spread),
            effective=effective_rank(spread),
            shift=subspace_shift(base.directions[layer], directions),
        )

    def _ends(self) -> Iterator[Tensor]:
        """Of each layer the down projection's outputs (statements, hidden) at the statements'
        ends, in the order of the canary's groups."""
        caught: list[list[Tensor]] = [[] for _ in range(self.model.layers)]

        def watch(layer: int, _inputs: Tensor, outputs: Tensor) -> None:
            caught[layer].append(outputs[:, -1].clone())  # a slice would keep all tokens

        with self.model.tap({n: partial(watch, n) for n in range(self.model.layers)}):
            for _ in self.canary.endings():
                pass
        for parts in caught:
            yield torch.cat(parts) if parts else torch.empty(0, self.model.hidden)


def _principal(activations: Tensor, count: int) -> Tensor:
    """An orthonormal basis (hidden, count) of what activations (n, hidden) vary in the most."""
    return strongest((activations - activations.mean(0)).mT, count)[1]
