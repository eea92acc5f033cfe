"""Teacher-forced scores of wanted answers, and short greedy continuations, in batches of rows."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from memory.model.editable import EditableModel
from memory.model.generate import MAX_BATCH_ROWS, Overlay, group_by_length
from policies.prompts import TokenRow


@dataclass(frozen=True)
class PromptAnswer:
    """Prompt and an answer to it, as token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class AnswerScore:
    """Mean negative log-likelihood of an answer's tokens, and whether each is the argmax."""

    loss: float
    token_hits: tuple[bool, ...]


def score_answers(
    model: EditableModel, rows: Sequence[PromptAnswer], overlay: Overlay | None = None
) -> list[AnswerScore]:
    """Score every row, in the order given.

    With an overlay, score token by token: it routes at the prompt's end, and changes only the last
    column of a pass.
    """
    scores: dict[int, AnswerScore] = {}
    if overlay is None:
        order = sorted(range(len(rows)), key=lambda n: len(rows[n].prompt) + len(rows[n].answer))
        chunks = [order[i : i + MAX_BATCH_ROWS] for i in range(0, len(order), MAX_BATCH_ROWS)]
    else:
        chunks = group_by_length([row.prompt for row in rows])
    for places in chunks:
        chunk = [rows[n] for n in places]
        score_chunk = _score_padded if overlay is None else _score_stepwise
        with torch.no_grad(), overlay(places) if overlay else nullcontext():
            scores.update(zip(places, score_chunk(model, chunk), strict=True))
    return [scores[n] for n in range(len(rows))]


def _score_padded(model: EditableModel, rows: Sequence[PromptAnswer]) -> list[AnswerScore]:
    """Score in one pass, padded on the right: causal attention hides pads from real tokens."""
    inputs = [(*row.prompt, *row.answer[:-1]) for row in rows]
    width = max(map(len, inputs))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for n, row_ids in enumerate(inputs):
        ids[n, : len(row_ids)] = torch.tensor(row_ids)
    first = min(len(row.prompt) for row in rows) - 1
    out = model.hf_model(
        input_ids=ids.to(model.device), use_cache=False, logits_to_keep=width - first
    )
    result = []
    for logits, row in zip(out.logits, rows, strict=True):
        start = len(row.prompt) - 1 - first
        result.append(_score_logits(logits[start : start + len(row.answer)], row.answer))
    return result


def _score_stepwise(model: EditableModel, rows: Sequence[PromptAnswer]) -> list[AnswerScore]:
    """Feed the prompts, of one length, then the answers token by token, with the KV cache."""
    seen: list[Tensor] = []  # of each token, (rows, vocabulary)
    step, cache = torch.tensor([row.prompt for row in rows], device=model.device), None
    for n in range(max(len(row.answer) for row in rows)):
        out = model.hf_model(
            input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        cache = out.past_key_values
        seen.append(out.logits[:, -1])
        fed = [row.answer[min(n, len(row.answer) - 1)] for row in rows]
        step = torch.tensor(fed, device=model.device)[:, None]
    return [
        _score_logits(torch.stack([s[n] for s in seen[: len(row.answer)]]), row.answer)
        for n, row in enumerate(rows)
    ]


def _score_logits(logits: Tensor, answer: tuple[int, ...]) -> AnswerScore:
    """Score an answer from logits (tokens, vocabulary) at its tokens."""
    wanted = torch.tensor(answer, device=logits.device)
    loss = F.cross_entropy(logits.float(), wanted)
    return AnswerScore(float(loss), tuple((logits.argmax(-1) == wanted).tolist()))


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
        step, cache = torch.tensor([prompts[p] for p in places], device=model.device), None
        steps: list[Tensor] = []
        with torch.no_grad():
            for _ in range(tokens):
                out = model.hf_model(
                    input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                cache = out.past_key_values
                step = out.logits[:, -1:].argmax(-1)
                steps.append(step)
        for place, row in zip(places, torch.cat(steps, 1).tolist(), strict=True):
            end = row.index(model.end_token) + 1 if model.end_token in row else len(row)
            result[place] = tuple(row[:end])
    return result
