"""The long-term tier: MEMIT-MASS, the weights as one joint solve over the facts that live there."""

from collections.abc import Mapping

from safetensors.torch import load, save
from torch import Tensor

from memory.statistics import LayerStatistics
from policies.site import EditSite
from policies.solver import RidgeSolver, stacked
from policies.targets import Terms


def pack(terms: Terms) -> bytes:
    """Terms as safetensors bytes, the same for the same terms. Keys are kept in bfloat16, which
    halves them and changes no figure; a residual is what the fact is, and stays exact."""
    tensors = {f"keys/{n}": k.bfloat16().contiguous() for n, k in terms.keys.items()}
    tensors |= {f"residual/{n}": r.contiguous() for n, r in terms.residuals.items()}
    return save(tensors)


def unpack(blob: bytes) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
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

    def deltas(self, terms: Mapping[str, bytes]) -> dict[int, Tensor]:
        """ΔW (hidden, width) by layer for packed terms by fact id; nothing for no facts.

        The rows are ordered by fact id, so that the same facts give the same bytes.
        """
        opened = [unpack(terms[fact_id]) for fact_id in sorted(terms)]
        if not opened:
            return {}
        result = {}
        for layer in self.site.layers:
            keys, residuals = stacked([(k[layer], r[layer]) for k, r in opened])
            result[layer] = self._solvers[layer].solve(keys, residuals)
        return result
