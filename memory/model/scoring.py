"""Teacher-forced scoring: loss and correctness of the tokens of wanted answers, in batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from memory.model.editable import EditableModel
from memory.model.generate import MAX_BATCH_ROWS, Overlay, decode_steps, group_by_length


@dataclass(frozen=True)
class PromptAnswer:
    """A prompt and a wanted answer to it, as token ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class AnswerScore:
    """Mean negative log-likelihood of an answer's tokens, the likeliest token at each position, and
    whether it is the wanted one."""

    loss: float
    tokens: tuple[int, ...]
    token_hits: tuple[bool, ...]


def score_answers(
    model: EditableModel,
    rows: Sequence[PromptAnswer],
    overlay: Overlay | None = None,
    *,
    rows_per_pass: int = MAX_BATCH_ROWS,
) -> list[AnswerScore]:
    """Score every row, in the order given.

    With an overlay token by token, since it routes at the prompt's end and changes only the last
    column of a pass.
    """
    result: dict[int, AnswerScore] = {}
    if overlay is None:
        order = sorted(range(len(rows)), key=lambda n: len(rows[n].prompt) + len(rows[n].answer))
        chunks = [order[i : i + rows_per_pass] for i in range(0, len(order), rows_per_pass)]
    else:
        chunks = group_by_length([row.prompt for row in rows], rows_per_pass)
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
    """Score in one pass, padded on the right, where no real token attends to a pad."""
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
    """Score answers to prompts of one length token by token, with a KV cache."""
    steps = max(len(row.answer) for row in rows)
    # A shorter answer is continued with its last token; nothing after its end is read.
    fed = [row.answer + row.answer[-1:] * (steps - len(row.answer)) for row in rows]
    prompts = torch.tensor([row.prompt for row in rows], device=model.device)
    answers = torch.tensor(fed, device=model.device)
    seen = decode_steps(model, prompts, steps, forced=answers, logits_to_keep=1)
    logits = torch.stack(list(seen), 1)  # (rows, steps, vocabulary)
    return [_score_logits(logits[n, : len(row.answer)], row.answer) for n, row in enumerate(rows)]


def _score_logits(logits: Tensor, answer: tuple[int, ...]) -> AnswerScore:
    """Score an answer by the logits (tokens, vocabulary) at the positions of its tokens."""
    wanted = torch.tensor(answer, device=logits.device)
    loss, likeliest = F.cross_entropy(logits.float(), wanted), logits.argmax(-1)
    hits = (likeliest == wanted).tolist()
    return AnswerScore(float(loss), tuple(likeliest.tolist()), tuple(hits))
