"""Losses of targets with the graph, and short greedy continuations, in batches of rows."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from memory.model.editable import EditableModel
from memory.model.generate import decode_steps, group_by_length
from policies.prompts import TokenRow


def compute_target_losses(logits: Tensor, rows: Sequence[TokenRow]) -> Tensor:
    """Compute the mean NLL (rows,) of each row's target from logits (rows, tokens, vocabulary)."""
    return torch.stack(
        [
            F.cross_entropy(
                each[row.prompt_length - 1 : len(row.ids) - 1].float(),
                torch.tensor(row.target, device=each.device),
            )
            for each, row in zip(logits, rows, strict=True)
        ]
    )


def continue_greedily(
    model: EditableModel, prompts: Sequence[tuple[int, ...]], tokens: int
) -> list[tuple[int, ...]]:
    """Return the first tokens of each greedy answer, up to and including an end of text."""
    result: list[tuple[int, ...]] = [()] * len(prompts)
    for places in group_by_length(prompts):
        ids = torch.tensor([prompts[p] for p in places], device=model.device)
        with torch.no_grad():
            steps = list(decode_steps(model, ids, tokens, logits_to_keep=1))
        answers = torch.stack(steps, 1).argmax(-1)  # (rows, steps)
        for place, row in zip(places, answers.tolist(), strict=True):
            end = row.index(model.end_token) + 1 if model.end_token in row else len(row)
            result[place] = tuple(row[:end])
    return result
