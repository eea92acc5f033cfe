"""Keys and gradients of a row's tokens in a layer: all that editors by gradient read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from kedit_daemon.bench.scoring import compute_target_losses
from memory.facts import Fact
from memory.model.editable import EditableModel
from policies.prompts import TokenRow, make_rows, pad_rows

LAST_BLOCKS = 3
ROWS_PER_PASS = 64  # whose logits are all held at once


@dataclass(frozen=True)
class GradientPairs:
    """Keys u (tokens, width) of a down projection, and gradients δ (tokens, hidden) of the loss in
    its outputs. owners (tokens,): the row of each."""

    keys: Tensor
    gradients: Tensor
    owners: Tensor


def choose_last_layers(model: EditableModel) -> tuple[int, ...]:
    """Choose the layers that editors by gradient edit: those of the last blocks."""
    return tuple(range(max(model.layer_count - LAST_BLOCKS, 0), model.layer_count))


def make_target_row(model: EditableModel, fact: Fact) -> TokenRow:
    """Return the bare prompt of a fact, and its target with the token that ends a text, where the
    tokenizer has one. Raise Rejected for a fact that does not fit the model."""
    return make_rows(model, replace(fact, paraphrases=()))[0]


def read_gradient_pairs(
    model: EditableModel, layers: Sequence[int], rows: Sequence[TokenRow], *, answers_only: bool
) -> tuple[dict[int, GradientPairs], Tensor]:
    """Read each layer's pairs, and the loss (rows,) of the targets, under the present weights.

    answers_only: only tokens from which a target's token is predicted; otherwise all of a row.
    """
    parts, losses = list[dict[int, GradientPairs]](), list[Tensor]()
    for first in range(0, len(rows), ROWS_PER_PASS):
        part = rows[first : first + ROWS_PER_PASS]
        pairs, loss = _read_part(model, layers, part, first, answers_only)
        parts.append(pairs)
        losses.append(loss)
    joined = {n: [part[n] for part in parts] for n in layers}
    return {
        n: GradientPairs(
            torch.cat([pairs.keys for pairs in found]),
            torch.cat([pairs.gradients for pairs in found]),
            torch.cat([pairs.owners for pairs in found]),
        )
        for n, found in joined.items()
    }, torch.cat(losses)


def _read_part(
    model: EditableModel,
    layers: Sequence[int],
    rows: Sequence[TokenRow],
    first: int,
    answers_only: bool,
) -> tuple[dict[int, GradientPairs], Tensor]:
    """Read some rows, of which the first is number `first`, in one pass."""
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
    owners = first + is_read.nonzero()[:, 0]
    return {
        n: GradientPairs(seen[n][0][is_read], gradient[is_read], owners)
        for n, gradient in zip(layers, gradients, strict=True)
    }, losses.detach()
