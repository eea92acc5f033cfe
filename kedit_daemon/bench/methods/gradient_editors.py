"""MEND, MALMEN and UltraEdit: updates made of the gradient of one pass, one batch after another.

Each edits the down projections of the last blocks. MEND and MALMEN make an update with a network
that was trained for one model; UltraEdit (Gu et al. 2025) needs none.
"""

from collections.abc import Mapping, Sequence

import torch
from safetensors import SafetensorError
from torch import Tensor

from kedit_daemon.bench.methods.gradient_pairs import (
    GradientPairs,
    choose_last_layers,
    make_target_row,
    read_gradient_pairs,
)
from kedit_daemon.bench.methods.hypernetwork import load_hypernetwork, solve_shifts
from kedit_daemon.bench.methods.method import MethodSetup
from kedit_daemon.bench.methods.stacking import StackingMethod
from kedit_daemon.editing.known_measurements import locate_known
from memory.errors import KeditError
from memory.facts import Fact

# UltraEdit's η, by a sweep on 100 facts of ZsRE's training records. Published: 1e-6, for models of
# 7 B and more.
ULTRA_RATE = 1e-2
ULTRA_RIDGE = 1.0


class GradientEditor(StackingMethod):
    """Base of the editors that read each layer's keys and gradients once, and add an update."""

    answers_only = True  # whether only the tokens that predict a target's are read

    def __init__(self, setup: MethodSetup) -> None:
        super().__init__(setup)
        self.layers = self.choose_layers()
        self.start_layers(self.layers)
        if len({delta.shape for delta in self.deltas.values()}) > 1:
            raise KeditError(
                f"layers {self.layers} differ in width, and editors by gradient need equal ones",
                code="unsupported",
                hint="choose another method",
            )

    def choose_layers(self) -> tuple[int, ...]:
        """Choose the layers to edit."""
        return choose_last_layers(self.model)

    def edit(self, facts: Sequence[Fact]) -> None:
        """Add one update for the whole batch; one that is not finite leaves the weights alone."""
        rows = [make_target_row(self.model, fact) for fact in facts]
        with self.stopwatch.time_part("gradients"):
            pairs, _ = read_gradient_pairs(
                self.model, self.layers, rows, answers_only=self.answers_only
            )
        lengths = [pair.gradients.norm() for pair in pairs.values()]
        self.last_gradient = float(torch.stack(lengths).norm())
        with self.stopwatch.time_part("solve"), torch.no_grad():
            updates = self.compute_updates(pairs)
        if all(bool(update.isfinite().all()) for update in updates.values()):
            self.add_updates(updates)
        else:
            self.not_edited += len(facts)

    def compute_updates(self, pairs: Mapping[int, GradientPairs]) -> dict[int, Tensor]:
        """Compute each layer's update (hidden, width)."""
        raise NotImplementedError


class UltraEdit(GradientEditor):
    """Value shifts along the normalised gradient, met by least squares.

    The normaliser runs over all tokens of the stream so far, one for all layers of a shape.
    """

    def __init__(self, setup: MethodSetup) -> None:
        super().__init__(setup)
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def compute_updates(self, pairs: Mapping[int, GradientPairs]) -> dict[int, Tensor]:
        """Compute ΔW = Dᵀ K (Kᵀ K + I)⁻¹, with d = −η ‖k̂‖² δ̂ of the normalised pair."""
        inputs = {n: torch.cat([pair.keys, pair.gradients], 1) for n, pair in pairs.items()}
        for each in inputs.values():
            if each.isfinite().all():  # a NaN would stay in the mean for ever
                self._count_tokens(each)
        deviation = (self.squares / self.count).sqrt().clamp(min=1e-12)
        updates = {}
        for n, pair in pairs.items():
            normal = (inputs[n] - self.mean) / deviation
            keys, gradients = normal.split([pair.keys.shape[1], pair.gradients.shape[1]], 1)
            shifts = -ULTRA_RATE * keys.square().sum(1, keepdim=True) * gradients
            updates[n] = solve_shifts(pair.keys, shifts, ULTRA_RIDGE)
        return updates

    def _count_tokens(self, inputs: Tensor) -> None:
        """Take tokens (n, size) into the running mean and variance (Chan et al. 1983)."""
        new, mean = len(inputs), inputs.mean(0)
        total, shift = self.count + new, mean - self.mean
        self.squares = self.squares + (inputs - mean).square().sum(0)
        self.squares = self.squares + shift.square() * self.count * new / total
        self.mean, self.count = self.mean + shift * new / total, total


class HypernetworkEditor(GradientEditor):
    """Base of the editors with a trained network."""

    network_file: str

    def choose_layers(self) -> tuple[int, ...]:
        """Load the network of this model, and choose its layers. Raise KeditError without one."""
        file = locate_known(self.loaded_model.opened.base_hash) / self.network_file
        if not file.is_file():
            raise KeditError(
                f"no {self.network_file} has been trained for {self.loaded_model.name}",
                code="unsupported",
                hint="take --model shipped, or train one in a checkout: "
                "python -m tools.train_hypernetworks mend|malmen MODEL FILE",
            )
        try:
            self.network = load_hypernetwork(file).to(self.model.device)
        except (SafetensorError, KeyError, RuntimeError) as error:
            raise KeditError(
                f"{file} cannot be read: {error}", code="unsupported", hint="install it anew"
            ) from error
        return self.network.layers


class Mend(HypernetworkEditor):
    """MEND: ΔW = −η Σ δ̃ ũᵀ over the tokens of each row."""

    network_file = "mend.kedit"
    answers_only = False

    def compute_updates(self, pairs: Mapping[int, GradientPairs]) -> dict[int, Tensor]:
        updates = {}
        for place, n in enumerate(self.layers):
            up, down = self.network.compute_mend_factors(place, pairs[n].keys, pairs[n].gradients)
            updates[n] = up.T @ down
        return updates


class Malmen(HypernetworkEditor):
    """MALMEN: the shifts of all tokens of a batch, met at once by least squares."""

    network_file = "malmen.kedit"

    def compute_updates(self, pairs: Mapping[int, GradientPairs]) -> dict[int, Tensor]:
        return {
            n: self.network.compute_malmen_update(place, pairs[n].keys, pairs[n].gradients)
            for place, n in enumerate(self.layers)
        }
