"""Losses of targets with the graph, and short greedy continuations, in batches of rows."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from memory.facts import Fact
from memory.model.editable import EditableModel
from memory.model.generate import Overlay, decode_steps, group_by_length
from memory.model.scoring import PromptAnswer, score_answers
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


def check_stated(
    model: EditableModel, facts: Sequence[Fact], overlay: Overlay | None = None
) -> list[bool]:
    """Check for each fact whether all tokens of its target are the argmax behind its prompt."""
    rows = []
    for fact in facts:
        target = model.encode_target(fact.question, fact.target, fact.join)
        rows.append(PromptAnswer(tuple(model.encode(fact.question)), tuple(target)))
    return [all(row.token_hits) for row in score_answers(model, rows, overlay)]


def continue_greedily(
    model: EditableModel,
    prompts: Sequence[tuple[int, ...]],
    tokens: int,
    overlay: Overlay | None = None,
    is_enough: Callable[[int, Sequence[int]], bool] = lambda _place, _answer: False,
) -> list[tuple[int, ...]]:
    """Return the first tokens of each greedy answer, up to and including one that ends it, or until
    what there is of a prompt's answer, by its place, is enough."""
    result: list[list[int]] = [[] for _ in prompts]
    for places in group_by_length(prompts):
        ids = torch.tensor([prompts[p] for p in places], device=model.device)
        running = set(places)
        with torch.no_grad(), overlay(places) if overlay else nullcontext():
            for logits in decode_steps(model, ids, tokens, logits_to_keep=1):
                for place, token in zip(places, logits.argmax(-1).tolist(), strict=True):
                    if place not in running:
                        continue
                    result[place].append(token)
                    if token in model.stop_tokens or is_enough(place, result[place]):
                        running.remove(place)
                if not running:
                    break
    return [tuple(answer) for answer in result]
