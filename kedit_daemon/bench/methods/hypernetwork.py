"""Hypernetwork of MEND and MALMEN: makes of a token's key and gradient those of an update.

MEND (Mitchell et al. 2022, section 3): two blocks of low rank with a residual connection, which
start as the identity on normalised inputs; one network for all layers of a shape, with a scale and
an offset for each layer. MALMEN (Tan et al. 2024) takes the same network.
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

NORM_FLOOR = 1e-6  # of a standard deviation
LAYERS = "layers"  # in the metadata of its file


class ResidualBlock(nn.Module):
    """x + ReLU(s ⊙ (U V x + b) + o), with s and o of the layer (MEND, eq. 3)."""

    def __init__(self, size: int, rank: int, layers: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, size) / size**0.5)  # V
        self.up = nn.Parameter(torch.zeros(size, rank))  # U
        self.bias = nn.Parameter(torch.zeros(size))
        self.scales = nn.Parameter(torch.ones(layers, size))
        self.offsets = nn.Parameter(torch.zeros(layers, size))

    def forward(self, inputs: Tensor, place: int) -> Tensor:
        inner = inputs @ self.down.T @ self.up.T + self.bias
        # Not F.relu, whose gradient at 0, where every block starts, is 0.
        return inputs + (self.scales[place] * inner + self.offsets[place]).clamp(min=0)


class Hypernetwork(nn.Module):
    """Network for the layers that it edits, by their place: layers[place] is the model's layer."""

    means: Tensor
    deviations: Tensor

    def __init__(self, layers: tuple[int, ...], size: int, rank: int, rate: float = 1.0) -> None:
        """size: of a key and a gradient together. rate: of the updates, to start from."""
        super().__init__()
        self.layers = layers
        self.blocks = nn.ModuleList(ResidualBlock(size, rank, len(layers)) for _ in range(2))
        self.log_rates = nn.Parameter(torch.full((len(layers),), rate).log())
        self.log_ridges = nn.Parameter(torch.zeros(len(layers)))  # MALMEN's λ
        self.register_buffer("means", torch.zeros(len(layers), size))
        self.register_buffer("deviations", torch.ones(len(layers), size))

    def fit_inputs(self, place: int, keys: Tensor, gradients: Tensor) -> None:
        """Take means and standard deviations of a layer's inputs from these tokens."""
        inputs = torch.cat([keys, gradients], 1)
        self.means[place] = inputs.mean(0)
        self.deviations[place] = inputs.std(0).clamp(min=NORM_FLOOR)

    def transform(self, place: int, keys: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Return the network's ũ (tokens, width) and δ̃ (tokens, hidden)."""
        inputs = torch.cat([keys, gradients], 1)
        outputs = (inputs - self.means[place]) / self.deviations[place]
        for block in self.blocks:
            outputs = block(outputs, place)
        made_keys, made_gradients = outputs.split([keys.shape[1], gradients.shape[1]], 1)
        return made_keys, made_gradients

    def compute_mend_factors(
        self, place: int, keys: Tensor, gradients: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return B (tokens, hidden) and A (tokens, width) of MEND's ΔW = Bᵀ A = −η Σ δ̃ ũᵀ."""
        made_keys, made_gradients = self.transform(place, keys, gradients)
        return -self.log_rates[place].exp() * made_gradients, made_keys

    def compute_malmen_update(self, place: int, keys: Tensor, gradients: Tensor) -> Tensor:
        """Return MALMEN's ΔW = Dᵀ K (Kᵀ K + λ I)⁻¹ (hidden, width): the shifts d = −η (ũᵀ u) δ̃ of
        all tokens met at once by least squares."""
        made_keys, made_gradients = self.transform(place, keys, gradients)
        sizes = (keys * made_keys).sum(1, keepdim=True)
        shifts = -self.log_rates[place].exp() * sizes * made_gradients  # D (tokens, hidden)
        return solve_shifts(keys, shifts, self.log_ridges[place].exp())


def solve_shifts(keys: Tensor, shifts: Tensor, ridge: Tensor | float) -> Tensor:
    """Return Dᵀ K (Kᵀ K + λ I)⁻¹ (hidden, width), as Dᵀ (K Kᵀ + λ I)⁻¹ K: one side a token.

    Solved in float64; the result is not finite where there is no solution.
    """
    k = keys.double()
    gram = k @ k.T + ridge * torch.eye(len(k), device=k.device, dtype=k.dtype)
    solved, failed = torch.linalg.solve_ex(gram, k)
    solved = torch.where(failed == 0, solved, torch.nan)
    return (shifts.double().T @ solved).to(keys.dtype)


def save_hypernetwork(network: Hypernetwork, file: Path) -> None:
    """Write a trained network in float16, with its layers."""
    tensors = {name: tensor.half().contiguous() for name, tensor in network.state_dict().items()}
    save_file(tensors, file, {LAYERS: json.dumps(network.layers)})


def load_hypernetwork(file: Path) -> Hypernetwork:
    """Load a trained network, in float32."""
    with safe_open(file, "pt") as opened:
        layers = tuple(json.loads(opened.metadata()[LAYERS]))
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    rank, size = tensors["blocks.0.down"].shape
    network = Hypernetwork(layers, size, rank)
    network.load_state_dict(tensors)
    return network.requires_grad_(False)
