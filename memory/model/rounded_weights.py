"""Rounding of a model's weights to a few bits, as quantisers do it, and back without a trace."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from memory.model.editable import EditableModel

GROUP_SIZE = 32  # inputs that share a scale, as in GGUF's Q8_0 and Q4_0


def round_matrix(weight: Tensor, bits: int) -> Tensor:
    """Round a matrix (outputs, inputs) to symmetric integers of `bits` bits.

    Each group of 32 inputs of an output has a scale, by its largest magnitude: the numbers are
    q · s with |q| <= 2^(bits - 1) - 1. The last group may be shorter.
    """
    outputs, inputs = weight.shape
    groups = pad(weight, (0, -inputs % GROUP_SIZE)).reshape(outputs, -1, GROUP_SIZE)
    scale = groups.abs().amax(-1, keepdim=True) / (2 ** (bits - 1) - 1)
    rounded: Tensor = (groups / scale.where(scale > 0, 1)).round() * scale
    return rounded.reshape(outputs, -1)[:, :inputs]


@contextmanager
def serve_rounded(model: EditableModel, bits: int) -> Iterator[None]:
    """Run the block with the matrices of all blocks rounded to `bits` bits.

    Embeddings and the head keep their precision, as quantisers leave them. The model's own tensors
    are put aside and put back, not written to: they are the same bits afterwards. Needs memory for
    a second copy of the rounded matrices.
    """
    head = model.hf_model.get_output_embeddings()
    kept = [
        (module, module.weight)
        for module in model.hf_model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]
    try:
        for module, weight in kept:
            # Conv1D holds (inputs, outputs).
            turned = isinstance(module, Conv1D)
            rounded = round_matrix(weight.T if turned else weight, bits)
            module.weight = nn.Parameter(
                (rounded.T if turned else rounded).contiguous(), requires_grad=False
            )
        yield
    finally:
        for module, weight in kept:
            module.weight = weight
