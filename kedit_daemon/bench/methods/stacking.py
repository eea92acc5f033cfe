"""Base of the editors that add each update to those before it, so that none can be taken out."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from kedit_daemon.bench.methods.method import Method, MethodSetup


class StackingMethod(Method):
    """Editor with W − W0 (hidden, width) by layer in `deltas`; where these are set back, what else
    it keeps of the stream stays.

    last_gradient: length of the last gradient that it took a step by; None if it tells none.
    """

    def __init__(self, setup: MethodSetup) -> None:
        super().__init__(setup)
        self.deltas: dict[int, Tensor] = {}
        self.last_gradient: float | None = None

    @property
    def edited_layers(self) -> tuple[int, ...]:
        return tuple(self.deltas)

    def start_layers(self, layers: Iterable[int]) -> None:
        """Start with no change in the layers that the editor edits."""
        layers = tuple(layers)
        self.model.widen_layers(layers)
        self.deltas = {n: torch.zeros_like(self.model.base_weight(n)) for n in layers}

    def replace_deltas(self, deltas: Mapping[int, Tensor]) -> None:
        """Set the weights to W0 and these; also back to what they were before an edit."""
        self.deltas = dict(deltas)
        self.model.set_deltas(self.deltas)

    def add_updates(self, updates: Mapping[int, Tensor]) -> None:
        """Add an update (hidden, width) to each of some layers."""
        changed = {n: self.deltas[n] + update.to(self.deltas[n]) for n, update in updates.items()}
        self.replace_deltas(self.deltas | changed)
