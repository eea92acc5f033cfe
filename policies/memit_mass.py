"""The long-term tier: MEMIT-MASS, the weights as one joint solve over the facts that live there."""

from collections.abc import Mapping, Sequence

import torch
from safetensors.torch import load, save
from torch import Tensor

from memory.model.statistics import LayerStatistics
from policies.edit_site import EditSite
from policies.solver import RidgeSolver, narrow_to_float32, stack_facts
from policies.targets import EditTerms


def pack_terms(terms: EditTerms) -> bytes:
    """Terms as safetensors bytes, the same for the same terms. Keys are kept in bfloat16, which
    halves them and changes no figure; a residual is what the fact is, and stays exact."""
    tensors = {f"keys/{n}": k.bfloat16().contiguous() for n, k in terms.keys.items()}
    tensors |= {f"residual/{n}": r.contiguous() for n, r in terms.residuals.items()}
    return save(tensors)


def unpack_terms(blob: bytes) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Keys (rows, sites, width) and residuals (sites, hidden) by layer, as packed."""
    keys: dict[int, Tensor] = {}
    residuals: dict[int, Tensor] = {}
    for name, tensor in load(blob).items():
        kind, layer = name.split("/")
        (keys if kind == "keys" else residuals)[int(layer)] = tensor
    return keys, residuals


class WeightsTier:
    """The solvers of the edited layers, each with its prior factored once."""

    def __init__(self, site: EditSite, statistics: Mapping[int, LayerStatistics]) -> None:
        self.site = site
        self._solvers = {
            n: RidgeSolver(
                statistics[n].covariance,
                site.prior if n in site.subject_layers else site.end_prior,
                site.ridge,
            )
            for n in site.layers
        }

    def solve_deltas(self, terms: Mapping[str, bytes]) -> dict[int, Tensor]:
        """ΔW (hidden, width) by layer for packed terms by fact id; nothing for no facts.

        The rows are ordered by fact id, so that the same facts give the same bytes.
        """
        opened = [unpack_terms(terms[fact_id]) for fact_id in sorted(terms)]
        if not opened:
            return {}
        result = {}
        for layer in self.site.layers:
            keys, residuals = stack_facts([(k[layer], r[layer]) for k, r in opened])
            result[layer] = self._solvers[layer].solve(keys, residuals)
        return result

    def solve_factors(self, terms: Mapping[str, bytes]) -> dict[int, tuple[Tensor, Tensor]]:
        """What `deltas` solves, as exact factors by layer: B (hidden, rank) and A (rank, width)
        with ΔW = B A, in float32; nothing for no facts.

        ΔW = Rᵀ G is linear in the residuals, so G (rows, width) is the solve for R = I. All
        contexts of a fact share its residuals, and their rows of G add up: the rank is the number
        of facts times the sites of each.
        """
        opened = [unpack_terms(terms[fact_id]) for fact_id in sorted(terms)]
        if not opened:
            return {}
        result = {}
        for layer in self.site.layers:
            facts = [(k[layer], r[layer]) for k, r in opened]
            keys, _ = stack_facts(facts)
            rows = torch.eye(len(keys), dtype=torch.float64)
            spread = self._solvers[layer].solve_exact(keys, rows)  # G (rows, width)
            residuals = torch.cat([r for _, r in facts]).double()  # (rank, hidden)
            up = spread.new_zeros(len(residuals), spread.shape[1])
            up.index_add_(0, _index_residuals(facts), spread)
            result[layer] = _balance_factors(residuals.T, up)
        return result


def _index_residuals(facts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """For each row of `stacked`, which of the facts' residuals it has."""
    first, rows = 0, []
    for keys, residuals in facts:
        rows.append(torch.arange(first, first + len(residuals)).repeat(len(keys)))
        first += len(residuals)
    return torch.cat(rows)


def _balance_factors(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The factors with a column of one as long as its row of the other, up to a power of two,
    which costs no bit: who serves them in 16 bits must not lose what is small in one of them."""
    ratio = (up.norm(dim=1) / down.norm(dim=0)).nan_to_num(1.0, 1.0, 1.0).clamp(min=1e-300)
    scale = torch.exp2((ratio.log2() / 2).round())  # (rank,)
    return narrow_to_float32(down * scale), narrow_to_float32(up / scale[:, None])
