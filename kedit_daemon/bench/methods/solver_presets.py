"""Solver presets of the published methods, and a stream of facts through one of them.

The methods differ in the terms added to a batch's keys K and residuals R in the solve for ΔW, and
in whether batches are stacked. The caller gives λ and λ_n as measured for the model: λ_n in units
of E[k²], while published values are absolute and belong to the model they were found on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from memory.errors import KeditError
from memory.model.statistics import LayerStatistics
from policies.edit_site import EditSite
from policies.edit_terms import EditTerms
from policies.solver import RidgeSolver, narrow_to_float32, stack_facts

NULL_SPACE_LIMIT = 0.02  # eigenvalue of C0, in units of E[k²]: below it, ordinary text is rare


@dataclass(frozen=True)
class SolverSettings:
    """Settings of one layer's solve, all that the methods differ in."""

    prior: float  # λ: weight of C0
    ridge: float  # λ_n: weight of ‖ΔW‖², in units of E[k²]
    past_weight: float = 0.0  # weight of earlier batches' keys, whose outputs should not change
    projector: float | None = None  # eigenvalue, in units of E[k²], below which ΔW is allowed
    equality: bool = False  # meet the residuals exactly
    is_joint: bool = True  # solve for all facts from W0; otherwise stack each batch on the last

    def __post_init__(self) -> None:
        if self.past_weight < 0 or (self.past_weight and (self.is_joint or self.equality)):
            why = "past_weight must be at least 0, and 0 for a joint or an exact solve"
            raise KeditError(why, code="config")


Preset = Callable[[float, float], SolverSettings]
"""Function of λ and λ_n that returns the settings."""

PRESETS: Mapping[str, Preset] = {
    # ΔW = Rᵀ K (λ C0 + λ_n I + Kᵀ K)⁻¹ over all facts so far, as in the daemon. MEMIT in one batch,
    # a name of Wang et al. 2024 (WISE), here with λ_n as well; λ as for MEMIT.
    "memit-mass": lambda prior, ridge: SolverSettings(prior, ridge),
    # ΔW_t = R_tᵀ K_t (λ C0 + K_tᵀ K_t)⁻¹ (Meng et al. 2023, eq. 14), stacked. Earlier edits are not
    # protected. Published: λ = 15000 (GPT-J), 20000 (GPT2-XL).
    "memit": lambda prior, _ridge: SolverSettings(prior, ridge=0.0, is_joint=False),
    # ΔW_t = R_tᵀ K_t (λ C0 + Σ_{s<t} K_sᵀ K_s + K_tᵀ K_t + λ_n I)⁻¹ (Gupta et al. 2025). With
    # residuals against the current weights, the ΔW_t add up to memit-mass's ΔW.
    # Published: λ = 15000; λ_n = 20 (Llama-3), 10 (Llama-2, GPT2-XL).
    "encore": lambda prior, ridge: SolverSettings(prior, ridge, past_weight=1.0, is_joint=False),
    # ΔW_t = R_tᵀ K_t P (P (Σ_{s≤t} K_sᵀ K_s) P + λ_n I)⁻¹, P = U0 U0ᵀ (Fang et al. 2025). U0: the
    # eigenvectors of C0 with small eigenvalues. Published: eigenvalues below 2e-2, λ_n = 10
    # (Llama-3), both absolute.
    "alphaedit": lambda _prior, ridge: SolverSettings(
        0.0, ridge, past_weight=1.0, projector=NULL_SPACE_LIMIT, is_joint=False
    ),
    # ΔW_t = R_tᵀ (K_t C⁻¹ K_tᵀ)⁻¹ K_t C⁻¹, C = λ C0: K_t ΔW_tᵀ = R_t (Gupta et al. 2024).
    # Published: λ = 1e5, and 0.1 I added to K_t C⁻¹ K_tᵀ; without that, as here, λ has no effect.
    "emmet": lambda prior, _ridge: SolverSettings(prior, ridge=0.0, equality=True, is_joint=False),
}


@dataclass(frozen=True)
class _LayerSolution:
    """State of one layer after some batches, in float64.

    delta: ΔW (hidden, width) so far. keys (m, width), residuals (m, hidden): rows of earlier
    batches that enter the next solve; if stacked, √past_weight · k with a residual of 0, whose
    squared error is then past_weight · ‖ΔW k‖².
    """

    settings: SolverSettings
    solver: RidgeSolver
    delta: Tensor
    keys: Tensor
    residuals: Tensor

    def add_batch(self, keys: Tensor, residuals: Tensor) -> "_LayerSolution":
        """Solve for one more batch: keys (n, width), residuals δ = v − W0 k (n, hidden)."""
        joint, past = self.settings.is_joint, self.settings.past_weight
        if not joint:
            # (W0 k + δ) − W_{t−1} k, where W0 cancels
            residuals = residuals - keys @ self.delta.T
        all_keys = torch.cat([self.keys, keys])
        all_residuals = torch.cat([self.residuals, residuals])
        step = self.solver.solve_exact(all_keys, all_residuals)
        if joint:
            return replace(self, delta=step, keys=all_keys, residuals=all_residuals)
        delta = self.delta + step
        if not past:  # a weight of 0 needs no rows
            return replace(self, delta=delta)
        weighted = torch.cat([self.keys, past**0.5 * keys])
        return replace(self, delta=delta, keys=weighted, residuals=torch.zeros_like(all_residuals))


def _create_layer(s: SolverSettings, statistics: LayerStatistics) -> _LayerSolution:
    covariance = statistics.covariance
    solver = RidgeSolver(covariance, s.prior, s.ridge, s.projector, s.equality)
    width, hidden = len(covariance), len(statistics.output_mean)
    empty = torch.zeros(hidden, width, dtype=torch.float64)
    return _LayerSolution(s, solver, empty, empty[:0], empty.T[:0])


class PresetStream:
    """Stream of facts through one preset, batch by batch, in every edited layer of the site.

    The facts' terms are those of the unedited model. Nothing can be removed again.
    """

    def __init__(
        self, preset: Preset, site: EditSite, statistics: Mapping[int, LayerStatistics]
    ) -> None:
        """Raise KeditError if a layer's prior has no solution."""
        self._layers = {}
        for n in site.layers:
            prior = site.prior if n in site.subject_layers else site.end_prior
            self._layers[n] = _create_layer(preset(prior, site.ridge), statistics[n])

    def add(self, batch: Sequence[EditTerms]) -> dict[int, Tensor]:
        """Return ΔW (hidden, width) float32 against W0 by layer, over all batches so far.

        Raise NotFinite, with the stream unchanged, if ΔW has a NaN or Inf.
        """
        layers = self._layers
        if batch:
            layers = {n: layer.add_batch(*_stack_terms(batch, n)) for n, layer in layers.items()}
        result = {n: narrow_to_float32(layer.delta) for n, layer in layers.items()}
        self._layers = layers
        return result


def _stack_terms(batch: Sequence[EditTerms], layer: int) -> tuple[Tensor, Tensor]:
    """Stack a batch's keys (n, width) and residuals (n, hidden) in float64."""
    keys, residuals = stack_facts([(terms.keys[layer], terms.residuals[layer]) for terms in batch])
    return keys.double().cpu(), residuals.double().cpu()
