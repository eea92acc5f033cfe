"""Greedy answers, with the KV cache, each row to its own natural stop.

Rows of one length run together without padding, so that a row's numbers never depend on pads.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from memory.errors import OutOfMemory
from memory.model.editable import EditableModel
from memory.oom import as_out_of_memory

MAX_BATCH_ROWS = 64
log = logging.getLogger(__name__)


def cut_first_sentence(text: str) -> str:
    """An answer up to its natural stop: a line's end, or a full stop that ends a sentence."""
    line = text.strip().split("\n", 1)[0]
    for at, char in enumerate(line):
        if (
            char == "."
            and (at + 1 == len(line) or line[at + 1] == " ")
            and not _is_initial(line, at)
        ):
            return line[:at].strip()
    return line.strip()


def _is_initial(line: str, at: int) -> bool:
    """Whether the full stop belongs to an initial or a short title ("J. S. Bach", "St. Louis")."""
    word = line[:at].rsplit(" ", 1)[-1]
    return len(word) <= 2 and word[:1].isupper() and at + 1 < len(line)


def decode_steps(
    model: EditableModel,
    ids: Tensor,
    steps: int,
    *,
    forced: Tensor | None = None,
    logits_to_keep: int = 0,
) -> Iterator[Tensor]:
    """Yield the next-token logits (rows, vocabulary) of each step that follows ids (rows, tokens),
    with a KV cache.

    Each step feeds the likeliest tokens of the one before, or those of `forced` (rows, steps).
    `logits_to_keep` is transformers' own: how many last columns the first pass's head runs on (0:
    all). It decides the kernel and so the last bits of the first logits.
    """
    cache = None
    for n in range(steps):
        out = model.hf_model(
            input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=logits_to_keep
        )
        cache, logits = out.past_key_values, out.logits[:, -1]
        yield logits
        ids = logits.argmax(-1, keepdim=True) if forced is None else forced[:, n : n + 1]


def _decode_group(model: EditableModel, ids: Tensor, max_tokens: int) -> list[list[int]]:
    """Greedy continuation of rows of equal length: ids (rows, tokens) -> tokens per row."""
    answers: list[list[int]] = [[] for _ in range(ids.shape[0])]
    running = [True] * ids.shape[0]
    ends = model.stop_tokens
    for logits in decode_steps(model, ids, max_tokens):
        for row, token in enumerate(logits.argmax(-1).tolist()):
            if not running[row]:
                continue
            if token in ends:
                running[row] = False
                continue
            answers[row].append(token)
            text = model.decode(answers[row])
            if "\n" in text.lstrip() or len(cut_first_sentence(text)) < len(text.strip()) - 1:
                running[row] = False
        if not any(running):
            break
    return answers


def group_by_length(
    prompts: Sequence[Sequence[int]], most: int = MAX_BATCH_ROWS
) -> list[list[int]]:
    """Group the places of prompts of one length, at most `most` together."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        groups[len(prompt)].append(place)
    return [
        places[start : start + most]
        for places in groups.values()
        for start in range(0, len(places), most)
    ]


# Opens an overlay for a group of rows that run together; told their places among the prompts.
Overlay = Callable[[list[int]], AbstractContextManager[object]]


def generate_answers(
    model: EditableModel,
    prompts: Sequence[str],
    max_tokens: int,
    overlay: Overlay | None = None,
) -> list[str]:
    """One answer a prompt, each cut at its natural stop. Rows for which there is no memory together
    are run in halves. Raises OutOfMemory where there is none for one row."""
    encoded = [model.encode(p) for p in prompts]
    result = [""] * len(prompts)
    groups = deque(group_by_length(encoded))
    while groups:
        rows = groups.popleft()
        ids = torch.tensor([encoded[p] for p in rows], device=model.device)
        try:
            with as_out_of_memory(), torch.no_grad(), overlay(rows) if overlay else nullcontext():
                said = _decode_group(model, ids, max_tokens)
        except OutOfMemory as error:
            if len(rows) < 2:
                raise
            log.warning("%d answers are made in halves: %s", len(rows), error)
            groups.extendleft((rows[len(rows) // 2 :], rows[: len(rows) // 2]))
            continue
        for place, tokens in zip(rows, said, strict=True):
            result[place] = cut_first_sentence(model.decode(tokens))
    return result
