"""The terms of a fact in the joint solve: its keys and residuals, in memory and as bytes."""

from collections.abc import Mapping
from dataclasses import dataclass

from safetensors.torch import load, save
from torch import Tensor


@dataclass(frozen=True)
class EditTerms:
    """Terms of a fact by layer: keys k (rows, sites, width) and residuals (sites, hidden).

    A residual is δ = v − W0 k; all contexts of the fact share it. lengths: by layer the mean ‖v‖,
    in units of the layer's median ‖y‖.
    """

    keys: Mapping[int, Tensor]
    residuals: Mapping[int, Tensor]
    loss: float
    steps: int
    lengths: Mapping[int, float]


@dataclass(frozen=True)
class Refusal:
    """Reason why a fact has no targets or no shard; whether the side memory may take it instead."""

    reason: str
    can_use_side: bool = False


def pack_terms(terms: EditTerms) -> bytes:
    """Return terms as safetensors bytes, the same bytes for the same terms.

    Keys are kept in bfloat16, which halves them and changes no figure. A residual is what the fact
    is, and stays exact.
    """
    tensors = {f"keys/{n}": k.bfloat16().contiguous() for n, k in terms.keys.items()}
    tensors |= {f"residual/{n}": r.contiguous() for n, r in terms.residuals.items()}
    return save(tensors)


def unpack_terms(blob: bytes) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Return keys (rows, sites, width) and residuals (sites, hidden) by layer, as packed."""
    keys: dict[int, Tensor] = {}
    residuals: dict[int, Tensor] = {}
    for name, tensor in load(blob).items():
        kind, layer = name.split("/")
        (keys if kind == "keys" else residuals)[int(layer)] = tensor
    return keys, residuals
