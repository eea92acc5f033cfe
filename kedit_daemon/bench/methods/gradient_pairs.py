"""What editors by gradient read of a layer: the keys of a row's tokens, and the gradients there."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kedit_daemon.bench.scoring import compute_target_losses
from memory.facts import Fact
from memory.model.editable import EditableModel
from policies.prompts import TokenRow, make_rows, pad_rows


@dataclass(frozen=True)
class GradientPairs:
    """Keys u (tokens, width) of a down projection, and gradients δ (tokens, hidden) of the loss in
    its outputs. owners (tokens,): the row of each."""

    keys: Tensor
    gradients: Tensor
    owners: Tensor


def make_target_row(model: EditableModel, fact: Fact) -> TokenRow:
    """Return the bare prompt of a fact, and its target with the token that ends a text."""
    return make_rows(model, fact)[0]


def read_gradient_pairs(
    model: EditableModel, layers: Sequence[int], rows: Sequence[TokenRow], *, answers_only: bool
) -> tuple[dict[int, GradientPairs], Tensor]:
    """Read each layer's pairs, and the loss (rows,) of the targets, under the present weights.

    answers_only: only tokens from which a target's token is predicted; otherwise all of a row.
    """
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def catch(layer: int, inputs: Tensor, outputs: Tensor) -> Tensor:
        shift = torch.zeros_like(outputs, requires_grad=True)  # its gradient is that of the outputs
        seen[layer] = inputs.detach(), shift
        return outputs + shift

    width = max(len(row.ids) for row in rows)
    batch = pad_rows(list(rows), width, model.end_token or 0, model.device)
    with torch.enable_grad(), model.tap_layers({n: partial(catch, n) for n in layers}):
        logits = model.hf_model(input_ids=batch.ids, use_cache=False).logits
        losses = compute_target_losses(logits, rows)
        gradients = torch.autograd.grad(losses.sum(), [seen[n][1] for n in layers])
    places = torch.arange(width, device=model.device).expand(len(rows), -1)
    ends = torch.tensor([len(row.ids) - 1 for row in rows], device=model.device)[:, None]
    starts = batch.end_index[:, None] if answers_only else torch.zeros_like(ends)
    is_read = (places >= starts) & (places < ends)  # the last token predicts nothing
    owners = is_read.nonzero()[:, 0]
    return {
        n: GradientPairs(seen[n][0][is_read], gradient[is_read], owners)
        for n, gradient in zip(layers, gradients, strict=True)
    }, losses.detach()
