"""Teacher forcing: what the model gives to each token of wanted answers, rows side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from memory.model.editable import EditableModel
from memory.model.generate import MAX_BATCH_ROWS, Overlay, group_by_length
from policies.prompts import TokenRow


@dataclass(frozen=True)
class PromptAnswer:
    """A prompt and an answer to it, as ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class AnswerScore:
    """Mean negative log-likelihood of an answer's tokens, and which of them are the argmax."""

    loss: float
    token_hits: tuple[bool, ...]


def score_answers(
    model: EditableModel, rows: Sequence[PromptAnswer], overlay: Overlay | None = None
) -> list[AnswerScore]:
    """Every row scored, in the order given.

    With an overlay, token by token: it decides at the prompt's end, and changes only the last
    column of a pass.
    """
    result: dict[int, AnswerScore] = {}
    if overlay is None:
        order = sorted(range(len(rows)), key=lambda n: len(rows[n].prompt) + len(rows[n].answer))
        chunks = [order[i : i + MAX_BATCH_ROWS] for i in range(0, len(order), MAX_BATCH_ROWS)]
    else:
        chunks = group_by_length([row.prompt for row in rows])
    for places in chunks:
        chunk = [rows[n] for n in places]
        with torch.no_grad():
            if overlay is None:
                scored = _score_padded(model, chunk)
            else:
                with overlay(places):
                    scored = _score_stepwise(model, chunk)
        result.update(zip(places, scored, strict=True))
    return [result[n] for n in range(len(rows))]


def _score_padded(model: EditableModel, rows: Sequence[PromptAnswer]) -> list[AnswerScore]:
    """One pass, padded on the right, where causal attention keeps pads from every real token."""
    inputs = [(*row.prompt, *row.answer[:-1]) for row in rows]
    width = max(map(len, inputs))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for n, given in enumerate(inputs):
        ids[n, : len(given)] = torch.tensor(given)
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
    """The prompts, of one length, then the answers' tokens one at a time, with the KV cache."""
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
    """logits (tokens, vocabulary) for the tokens of an answer."""
    wanted = torch.tensor(answer, device=logits.device)
    loss = F.cross_entropy(logits.float(), wanted)
    return AnswerScore(float(loss), tuple((logits.argmax(-1) == wanted).tolist()))


def compute_target_losses(logits: Tensor, rows: Sequence[TokenRow]) -> Tensor:
    """Mean NLL (rows,) of each row's target from logits (rows, tokens, vocabulary), with the graph
    behind."""
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
    """The first tokens of each greedy answer; nothing after an end of text, which is included."""
    result: list[tuple[int, ...]] = [()] * len(prompts)
    for places in group_by_length(prompts):
        step, cache = torch.tensor([prompts[p] for p in places], device=model.device), None
        said: list[Tensor] = []
        with torch.no_grad():
            for _ in range(tokens):
                out = model.hf_model(
                    input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                cache = out.past_key_values
                step = out.logits[:, -1:].argmax(-1)
                said.append(step)
        for place, row in zip(places, torch.cat(said, 1).tolist(), strict=True):
            end = row.index(model.end_token) + 1 if model.end_token in row else len(row)
            result[place] = tuple(row[:end])
    return result
