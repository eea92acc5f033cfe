"""States of a prompt in the layers that decide whether a fact fires."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memory.side.side_memory import SideMemory


@dataclass(frozen=True)
class PromptStates:
    """Outputs of the key layer (tokens, hidden), and inputs (width,) and outputs (hidden,) of the
    side layer at the prompt's end."""

    key_outputs: Tensor
    inputs: Tensor
    outputs: Tensor


def read_states(side: SideMemory, ids: Sequence[int]) -> PromptStates:
    """Read a prompt's states, in a pass of the layers up to the side layer."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def keep_key(inputs: Tensor, outputs: Tensor) -> None:
        seen[side.gates.key_layer] = inputs[0], outputs[0]

    def keep_side(inputs: Tensor, outputs: Tensor) -> None:
        seen[side.layer] = inputs[0], outputs[0]

    with side.model.tap_layers({side.gates.key_layer: keep_key, side.layer: keep_side}):
        side.model.run_to_layer(torch.tensor([ids], device=side.model.device), side.layer)
    inputs, outputs = seen[side.layer]
    return PromptStates(seen[side.gates.key_layer][1], inputs[-1], outputs[-1])
