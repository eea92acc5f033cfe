"""Teacher forcing: what the model gives to each token of wanted answers, rows side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from memory.model.editable import EditableModel
from memory.model.generate import MAX_ROWS, Overlay, equally_long
from policies.prompts import Row


@dataclass(frozen=True)
class Wanted:
    """A prompt and an answer to it, as ids."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Forced:
    """Mean negative log-likelihood of an answer's tokens, and which of them are the argmax."""

    loss: float
    right: tuple[bool, ...]


def forced(
    model: EditableModel, rows: Sequence[Wanted], overlay: Overlay | None = None
) -> list[Forced]:
    """Every row scored, in the order given.

    With an overlay, token by token: it decides at the prompt's end, and changes only the last
    column of a pass.
    """
    result: dict[int, Forced] = {}
    if overlay is None:
        order = sorted(range(len(rows)), key=lambda n: len(rows[n].prompt) + len(rows[n].answer))
        chunks = [order[i : i + MAX_ROWS] for i in range(0, len(order), MAX_ROWS)]
    else:
        chunks = equally_long([row.prompt for row in rows])
    for places in chunks:
        chunk = [rows[n] for n in places]
        with torch.no_grad():
            if overlay is None:
                scored = _at_once(model, chunk)
            else:
                with overlay(places):
                    scored = _by_token(model, chunk)
        result.update(zip(places, scored, strict=True))
    return [result[n] for n in range(len(rows))]


def _at_once(model: EditableModel, rows: Sequence[Wanted]) -> list[Forced]:
    """One pass, padded on the right, where causal attention keeps pads from every real token."""
    inputs = [(*row.prompt, *row.answer[:-1]) for row in rows]
    width = max(map(len, inputs))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for n, given in enumerate(inputs):
        ids[n, : len(given)] = torch.tensor(given)
    first = min(len(row.prompt) for row in rows) - 1
    out = model.model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=width - first)
    result = []
    for logits, row in zip(out.logits, rows, strict=True):
        start = len(row.prompt) - 1 - first
        result.append(_judged(logits[start : start + len(row.answer)], row.answer))
    return result


def _by_token(model: EditableModel, rows: Sequence[Wanted]) -> list[Forced]:
    """The prompts, of one length, then the answers' tokens one at a time, with the KV cache."""
    seen: list[Tensor] = []  # of each token, (rows, vocabulary)
    step, cache = torch.tensor([row.prompt for row in rows], device=model.device), None
    for n in range(max(len(row.answer) for row in rows)):
        out = model.model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        seen.append(out.logits[:, -1])
        fed = [row.answer[min(n, len(row.answer) - 1)] for row in rows]
        step = torch.tensor(fed, device=model.device)[:, None]
    return [
        _judged(torch.stack([s[n] for s in seen[: len(row.answer)]]), row.answer)
        for n, row in enumerate(rows)
    ]


def _judged(logits: Tensor, answer: tuple[int, ...]) -> Forced:
    """logits (tokens, vocabulary) for the tokens of an answer."""
    wanted = torch.tensor(answer, device=logits.device)
    loss = F.cross_entropy(logits.float(), wanted)
    return Forced(float(loss), tuple((logits.argmax(-1) == wanted).tolist()))


def target_losses(logits: Tensor, rows: Sequence[Row]) -> Tensor:
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


def continued(
    model: EditableModel, prompts: Sequence[tuple[int, ...]], tokens: int
) -> list[tuple[int, ...]]:
    """The first tokens of each greedy answer; nothing after an end of text, which is included."""
    result: list[tuple[int, ...]] = [()] * len(prompts)
    for places in equally_long(prompts):
        step, cache = torch.tensor([prompts[p] for p in places], device=model.device), None
        said: list[Tensor] = []
        with torch.no_grad():
            for _ in range(tokens):
                out = model.model(
                    input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1
                )
                cache = out.past_key_values
                step = out.logits[:, -1:].argmax(-1)
                said.append(step)
        for place, row in zip(places, torch.cat(said, 1).tolist(), strict=True):
            end = row.index(model.end) + 1 if model.end in row else len(row)
            result[place] = tuple(row[:end])
    return result
