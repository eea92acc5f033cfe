"""Greedy answers, with the KV cache, each row to its own natural stop.

Rows of one length run together without padding, so that a row's numbers never depend on pads.
"""

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
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


def _decode_group(model: EditableModel, ids: Tensor, max_tokens: int) -> list[list[int]]:
    """Greedy continuation of rows of equal length: ids (rows, tokens) -> tokens per row."""
    answers: list[list[int]] = [[] for _ in range(ids.shape[0])]
    running = [True] * ids.shape[0]
    cache, ends = None, model.stop_tokens
    step = ids
    for _ in range(max_tokens):
        out = model.hf_model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        step = out.logits[:, -1:].argmax(-1)  # (rows, 1)
        for row, token in enumerate(step[:, 0].tolist()):
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


def group_by_length(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Places of prompts of one length, at most MAX_ROWS together."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        groups[len(prompt)].append(place)
    return [
        places[start : start + MAX_BATCH_ROWS]
        for places in groups.values()
        for start in range(0, len(places), MAX_BATCH_ROWS)
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
