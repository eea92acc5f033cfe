"""Greedy decoding with a KV cache, each answer up to its own natural stop.

Rows of one length run together without padding, so that a row's output never depends on pads.
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
    """Cut an answer at its natural stop: a line's end, or a full stop that ends a sentence."""
    line = text.strip().split("\n", 1)[0]
    for at, char in enumerate(line):
        if char == "." and line[at + 1 : at + 2] in ("", " ") and not _is_initial(line, at):
            return line[:at].strip()
    return line.strip()


def _is_initial(line: str, at: int) -> bool:
    """Check that the full stop ends an initial or a short title ("J. S. Bach", "St. Louis")."""
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
    """Yield next-token logits (rows, vocabulary) of each step after ids (rows, tokens).

    A step feeds the likeliest tokens of the one before, or those of `forced` (rows, steps).
    `logits_to_keep` is transformers' argument: the count of last columns that the head runs on (0:
    all). It decides the kernel, and so the last bits of the first logits.
    """
    cache, places = None, model.find_next_places(ids.tolist())
    for n in range(steps):
        out = model.hf_model(
            input_ids=ids,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            **({} if places is None or not n else {"position_ids": places + (n - 1)}),
        )
        cache, logits = out.past_key_values, out.logits[:, -1]
        yield logits
        ids = logits.argmax(-1, keepdim=True) if forced is None else forced[:, n : n + 1]


def _decode_group(
    model: EditableModel, ids: Tensor, max_tokens: int, whole: bool
) -> list[list[int]]:
    """Continue rows of one length greedily: ids (rows, tokens) -> answer tokens of each row."""
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
            if whole:
                continue
            text = model.decode(answers[row])
            if "\n" in text.lstrip() or len(cut_first_sentence(text)) < len(text.strip()) - 1:
                running[row] = False
        if not any(running):
            break
    return answers


def group_by_length(
    prompts: Sequence[Sequence[int]], limit: int = MAX_BATCH_ROWS
) -> list[list[int]]:
    """Group the places of prompts of one length, at most `limit` together."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        groups[len(prompt)].append(place)
    return [
        places[start : start + limit]
        for places in groups.values()
        for start in range(0, len(places), limit)
    ]


# Opens the overlay of rows that run together, given their places among the prompts.
Overlay = Callable[[list[int]], AbstractContextManager[object]]


def generate_answers(
    model: EditableModel,
    prompts: Sequence[str],
    max_tokens: int,
    overlay: Overlay | None = None,
    *,
    whole: bool = False,
) -> list[str]:
    """Generate one answer a prompt, cut at its natural stop, or `whole`, up to the end of its text:
    a reply in a chat. Out of memory, a group of rows is split in halves. Raises OutOfMemory when
    one row does not fit."""
    encoded = [model.encode(p) for p in prompts]
    result = [""] * len(prompts)
    groups = deque(group_by_length(encoded))
    while groups:
        rows = groups.popleft()
        ids = torch.tensor([encoded[p] for p in rows], device=model.device)
        try:
            with as_out_of_memory(), torch.no_grad(), overlay(rows) if overlay else nullcontext():
                answers = _decode_group(model, ids, max_tokens, whole)
        except OutOfMemory as error:
            if len(rows) < 2:
                raise
            log.warning("Splitting %d prompts in halves: %s", len(rows), error)
            groups.extendleft((rows[len(rows) // 2 :], rows[: len(rows) // 2]))
            continue
        for place, tokens in zip(rows, answers, strict=True):
            text = model.decode(tokens)
            result[place] = text.strip() if whole else cut_first_sentence(text)
    return result
