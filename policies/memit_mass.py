"""The long-term tier: MEMIT-MASS, the weights as one joint solve over the facts that live there."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from memory.model.statistics import LayerStatistics
from policies.edit_site import EditSite
from policies.edit_terms import unpack_terms
from policies.prompts import CONTEXTS
from policies.solver import RidgeSolver, drop_sink_keys, narrow_to_float32, stack_facts
from policies.summed_facts import Grid, LayerSums, LayerTerms, SummedFacts

SUMMED_SHARE = 0.25  # of a layer's width, in rows, from which sums are quicker than the rows


class WeightsTier:
    """The solvers of the edited layers, each with its prior factored once, by the first solve: a
    factor takes twice the memory of C0, and a home may have no fact in the weights."""

    def __init__(self, site: EditSite, statistics: Mapping[int, LayerStatistics]) -> None:
        self.site, self._statistics = site, statistics
        self._solvers: dict[int, RidgeSolver] = {}
        self._summed = SummedFacts(self._make_sums, self._read_rows)

    def _get_solver(self, layer: int) -> RidgeSolver:
        if layer not in self._solvers:
            is_subject = layer in self.site.subject_layers
            prior = self.site.prior if is_subject else self.site.end_prior
            known = self._statistics[layer]
            self._solvers[layer] = RidgeSolver(
                known.covariance, prior, self.site.ridge, sink_key=known.sink_key
            )
        return self._solvers[layer]

    def solve_deltas(
        self,
        terms: Mapping[str, bytes],
        read_gone: Callable[[str], bytes | None] = lambda _fact_id: None,
    ) -> dict[int, Tensor]:
        """Solve ΔW (hidden, width) by layer from packed terms by fact id; no layers for no facts.

        The same facts give the same bytes: the rows of a few are ordered by fact id, and those of
        many are summed exactly, from the sums of the solve before.
        read_gone: reads the terms of a fact that was among them then; None if they are lost.
        """
        if not self._has_many_rows(len(terms)):
            return {
                layer: self._get_solver(layer).solve(*stack_facts(facts))
                for layer, facts in self._unpack_by_layer(_sort_by_id(terms)).items()
            }
        summed = self._summed.sum_over(terms, read_gone)
        return {n: self._get_solver(n).solve_sums(s.gram, s.cross) for n, s in summed.items()}

    def _has_many_rows(self, facts: int) -> bool:
        """Check that some facts have so many rows that their sums are quicker."""
        widths = [self._get_solver(n).width for n in self.site.layers] if facts else []
        return bool(widths) and facts * len(CONTEXTS) >= SUMMED_SHARE * min(widths)

    def _make_sums(self) -> dict[int, LayerSums]:
        sums = {}
        for layer in self.site.layers:
            hidden = len(self._statistics[layer].output_mean)
            sums[layer] = LayerSums(self._get_solver(layer).width, hidden, self.get_grid(layer))
        return sums

    def get_grid(self, layer: int) -> Grid:
        """Return the grid on which a layer's keys and residuals are solved."""
        known = self._statistics[layer]
        hidden = len(known.output_mean)
        return Grid.measure(self._get_solver(layer).key_size, known.median_norm / hidden**0.5)

    def _read_rows(self, blobs: Sequence[bytes]) -> dict[int, LayerTerms]:
        return {n: stack_facts(facts) for n, facts in self._unpack_by_layer(blobs).items()}

    def solve_factors(self, terms: Mapping[str, bytes]) -> dict[int, tuple[Tensor, Tensor]]:
        """Solve the ΔW of `solve_deltas` as exact factors by layer: B (hidden, rank) and
        A (rank, width) with ΔW = B A, in float32; no layers for no facts.

        ΔW = Rᵀ G is linear in the residuals, so G (rows, width) is the solve for R = I. All
        contexts of a fact share its residuals, and their rows of G add up: the rank is the number
        of facts times the sites of each.
        """
        result = {}
        for layer, facts in self._unpack_by_layer(_sort_by_id(terms)).items():
            keys, _ = stack_facts(facts)
            rows = torch.eye(len(keys), dtype=torch.float64)
            spread = self._get_solver(layer).solve_exact(keys, rows)  # G (rows, width)
            residuals = torch.cat([r for _, r in facts]).double()  # (rank, hidden)
            up = spread.new_zeros(len(residuals), spread.shape[1])
            up.index_add_(0, _index_residuals(facts), spread)
            result[layer] = _balance_factors(residuals.T, up)
        return result

    def _unpack_by_layer(self, blobs: Sequence[bytes]) -> dict[int, list[tuple[Tensor, Tensor]]]:
        """Return by layer the facts' keys and residuals on its grid, in their order."""
        unpacked = [unpack_terms(blob) for blob in blobs]
        result = {}
        for layer in self.site.layers if unpacked else ():
            grid, sink_key = self.get_grid(layer), self._statistics[layer].sink_key
            result[layer] = [
                (
                    grid.round_keys(drop_sink_keys(keys[layer], sink_key)),
                    grid.round_residuals(residuals[layer]),
                )
                for keys, residuals in unpacked
            ]
        return result


def _sort_by_id(terms: Mapping[str, bytes]) -> list[bytes]:
    return [terms[fact_id] for fact_id in sorted(terms)]


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
