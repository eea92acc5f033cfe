"""The published methods by name, as switches of one solve, and a stream of facts through them.

They differ in what stands beside a batch's keys K and residuals R in the solve for its ΔW, and in
whether batches are stacked. λ and λ_n are the caller's, measured for the model: λ_n in units of
E[k²], while published ones are absolute and belong to the model that they were found on.
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

NULL_SPACE_LIMIT = (
    0.02  # eigenvalue of C0, in units of E[k²], below which ordinary text hardly goes
)


@dataclass(frozen=True)
class SolverSettings:
    """Everything that the methods differ in, for one layer."""

    prior: float  # λ: weight of C0
    ridge: float  # λ_n: weight of ‖ΔW‖², in units of E[k²]
    past_weight: float = 0.0  # weight of the keys of earlier batches, which are to stay as they are
    projector: float | None = None  # eigenvalue, in units of E[k²], below which ΔW is allowed
    equality: bool = False  # whether the residuals are met exactly
    is_joint: bool = True  # all facts at once from W0, or each batch stacked on those before

    def __post_init__(self) -> None:
        if self.past_weight < 0 or (self.past_weight and (self.is_joint or self.equality)):
            raise KeditError(
                "earlier keys have no negative weight, and one only where batches are stacked "
                "and residuals are weighed, not met",
                code="config",
            )


def memit_mass(prior: float, ridge: float) -> SolverSettings:
    """ΔW = Rᵀ K (λ C0 + λ_n I + Kᵀ K)⁻¹ over all facts so far: what the daemon itself does.

    MEMIT in one batch, named so by Wang et al. 2024 (WISE), here with λ_n as well; λ as for MEMIT.
    """
    return SolverSettings(prior, ridge)


def memit(prior: float, _ridge: float) -> SolverSettings:
    """ΔW_t = R_tᵀ K_t (λ C0 + K_tᵀ K_t)⁻¹ (Meng et al. 2023, eq. 14), batch on batch.

    Earlier edits are not protected. Published: λ = 15000 (GPT-J), 20000 (GPT2-XL).
    """
    return SolverSettings(prior, ridge=0.0, is_joint=False)


def encore(prior: float, ridge: float) -> SolverSettings:
    """ΔW_t = R_tᵀ K_t (λ C0 + Σ_{s<t} K_sᵀ K_s + K_tᵀ K_t + λ_n I)⁻¹ (Gupta et al. 2025).

    With residuals against the weights as they are, the sum of the ΔW_t is memit-mass's ΔW.
    Published: λ = 15000; λ_n = 20 (Llama-3), 10 (Llama-2, GPT2-XL).
    """
    return SolverSettings(prior, ridge, past_weight=1.0, is_joint=False)


def alphaedit(_prior: float, ridge: float) -> SolverSettings:
    """ΔW_t = R_tᵀ K_t P (P (Σ_{s≤t} K_sᵀ K_s) P + λ_n I)⁻¹, P = U0 U0ᵀ (Fang et al. 2025).

    U0: the eigenvectors of C0 with small eigenvalues. Published: eigenvalues below 2e-2, λ_n = 10
    (Llama-3), both absolute.
    """
    return SolverSettings(
        prior=0.0, ridge=ridge, past_weight=1.0, projector=NULL_SPACE_LIMIT, is_joint=False
    )


def emmet(prior: float, _ridge: float) -> SolverSettings:
    """ΔW_t = R_tᵀ (K_t C⁻¹ K_tᵀ)⁻¹ K_t C⁻¹, C = λ C0: K_t ΔW_tᵀ = R_t (Gupta et al. 2024).

    Published: λ = 1e5, and 0.1 I added to K_t C⁻¹ K_tᵀ; here nothing is, so λ makes no difference.
    """
    return SolverSettings(prior, ridge=0.0, equality=True, is_joint=False)


Preset = Callable[[float, float], SolverSettings]
"""From λ and λ_n to the switches."""

PRESETS: Mapping[str, Preset] = {
    "memit-mass": memit_mass,
    "memit": memit,
    "encore": encore,
    "alphaedit": alphaedit,
    "emmet": emmet,
}


@dataclass(frozen=True)
class _LayerSolution:
    """One layer after some batches, all in float64.

    delta: ΔW (hidden, width) so far. keys (m, width), residuals (m, hidden): the rows of earlier
    batches that are part of the next solve; of stacked ones √past times the key, with a residual of
    nothing, whose squared error is then past · ‖ΔW k‖².
    """

    settings: SolverSettings
    solver: RidgeSolver
    delta: Tensor
    keys: Tensor
    residuals: Tensor

    def add_batch(self, keys: Tensor, residuals: Tensor) -> "_LayerSolution":
        """One more batch: keys (n, width), residuals δ = v − W0 k (n, hidden)."""
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
        if not past:  # a weight of nothing needs no rows
            return replace(self, delta=delta)
        weighted = torch.cat([self.keys, past**0.5 * keys])
        return replace(self, delta=delta, keys=weighted, residuals=torch.zeros_like(all_residuals))


def _create_layer(switches: SolverSettings, statistics: LayerStatistics) -> _LayerSolution:
    solver = RidgeSolver(
        statistics.covariance,
        switches.prior,
        switches.ridge,
        switches.projector,
        switches.equality,
    )
    width, hidden = len(statistics.covariance), len(statistics.output_mean)
    empty = torch.zeros(hidden, width, dtype=torch.float64)
    return _LayerSolution(switches, solver, empty, empty[:0], empty.T[:0])


class PresetStream:
    """A stream of facts through one preset, batch by batch, in every edited layer of the site.

    The facts' terms are those of the unedited model; what a method makes of the batches that came
    before is its own affair. Nothing can be taken out again.
    """

    def __init__(
        self, preset: Preset, site: EditSite, statistics: Mapping[int, LayerStatistics]
    ) -> None:
        """Raises KeditError when a layer's prior has no solution."""
        self._layers = {}
        for n in site.layers:
            prior = site.prior if n in site.subject_layers else site.end_prior
            self._layers[n] = _create_layer(preset(prior, site.ridge), statistics[n])

    def add(self, batch: Sequence[EditTerms]) -> dict[int, Tensor]:
        """ΔW (hidden, width) float32 against W0 by layer, after this batch and all before it.

        Raises NotFinite rather than give back NaN or Inf; the stream then is
        as if the batch had not come.
        """
        layers = self._layers
        if batch:
            layers = {n: layer.add_batch(*_stack_terms(batch, n)) for n, layer in layers.items()}
        result = {n: narrow_to_float32(layer.delta) for n, layer in layers.items()}
        self._layers = layers
        return result


def _stack_terms(batch: Sequence[EditTerms], layer: int) -> tuple[Tensor, Tensor]:
    """A batch's keys (n, width) and residuals (n, hidden) in float64."""
    keys, residuals = stack_facts([(terms.keys[layer], terms.residuals[layer]) for terms in batch])
    return keys.double().cpu(), residuals.double().cpu()
