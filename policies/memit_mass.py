"""The long-term tier: MEMIT-MASS, the weights as one joint solve over the facts that live there."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from memory.model.statistics import LayerStatistics
from policies.edit_site import EditSite
from policies.edit_terms import unpack_terms
from policies.solver import RidgeSolver, drop_sink_keys, narrow_to_float32, stack_facts


class WeightsTier:
    """The solvers of the edited layers, each with its prior factored once, by the first solve: a
    factor takes twice the memory of C0, and a home may have no fact in the weights."""

    def __init__(self, site: EditSite, statistics: Mapping[int, LayerStatistics]) -> None:
        self.site, self._statistics = site, statistics
        self._solvers: dict[int, RidgeSolver] = {}

    def _get_solver(self, layer: int) -> RidgeSolver:
        if layer not in self._solvers:
            is_subject = layer in self.site.subject_layers
            prior = self.site.prior if is_subject else self.site.end_prior
            known = self._statistics[layer]
            self._solvers[layer] = RidgeSolver(
                known.covariance, prior, self.site.ridge, sink_key=known.sink_key
            )
        return self._solvers[layer]

    def solve_deltas(self, terms: Mapping[str, bytes]) -> dict[int, Tensor]:
        """Solve ΔW (hidden, width) by layer from packed terms by fact id; no layers for no facts.

        The rows are ordered by fact id, so that the same facts give the same bytes.
        """
        return {
            layer: self._get_solver(layer).solve(*stack_facts(facts))
            for layer, facts in self._unpack_by_layer(terms).items()
        }

    def solve_factors(self, terms: Mapping[str, bytes]) -> dict[int, tuple[Tensor, Tensor]]:
        """Solve the ΔW of `solve_deltas` as exact factors by layer: B (hidden, rank) and
        A (rank, width) with ΔW = B A, in float32; no layers for no facts.

        ΔW = Rᵀ G is linear in the residuals, so G (rows, width) is the solve for R = I. All
        contexts of a fact share its residuals, and their rows of G add up: the rank is the number
        of facts times the sites of each.
        """
        result = {}
        for layer, facts in self._unpack_by_layer(terms).items():
            keys, _ = stack_facts(facts)
            rows = torch.eye(len(keys), dtype=torch.float64)
            spread = self._get_solver(layer).solve_exact(keys, rows)  # G (rows, width)
            residuals = torch.cat([r for _, r in facts]).double()  # (rank, hidden)
            up = spread.new_zeros(len(residuals), spread.shape[1])
            up.index_add_(0, _index_residuals(facts), spread)
            result[layer] = _balance_factors(residuals.T, up)
        return result

    def _unpack_by_layer(
        self, terms: Mapping[str, bytes]
    ) -> dict[int, list[tuple[Tensor, Tensor]]]:
        """Return by layer the facts' keys and residuals, ordered by fact id."""
        unpacked = [unpack_terms(terms[fact_id]) for fact_id in sorted(terms)]
        layers = self.site.layers if unpacked else ()
        return {
            layer: [
                (drop_sink_keys(keys[layer], self._statistics[layer].sink_key), residuals[layer])
                for keys, residuals in unpacked
            ]
            for layer in layers
        }


def _index_residuals(facts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return for each row of `stack_facts` the index of its residual among all facts'."""
    first, rows = 0, []
    for keys, residuals in facts:
        rows.append(torch.arange(first, first + len(residuals)).repeat(len(keys)))
        first += len(residuals)
    return torch.cat(rows)


def _balance_factors(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Scale the factors so that a column of one is as long as its row of the other.

    By powers of two, which cost no bit: served in 16 bits, nothing small in one of them is lost.
    """
    ratio = (up.norm(dim=1) / down.norm(dim=0)).nan_to_num(1.0, 1.0, 1.0).clamp(min=1e-300)
    scale = torch.exp2((ratio.log2() / 2).round())  # (rank,)
    return narrow_to_float32(down * scale), narrow_to_float32(up / scale[:, None])
