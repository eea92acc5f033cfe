"""Rows that are decoded together with one KV cache; they join and leave between any two steps.

A row is read in by itself, or with others of its length, so that no pad is ever routed or read;
its keys and values are then laid beside those that run, with pads on the left that nothing sees.
What a row's fact lays over the model is decided once and held by the row: the side memory may
change meanwhile. Knows nothing of text, or of how a token is chosen.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from memory.model.editable import EditableModel
from memory.model.generate import equally_long
from memory.side.side_memory import Delta, Match, SideMemory


@dataclass(frozen=True)
class Joined:
    """Rows that have been read in: next-token logits (rows, vocabulary) where they end, and for
    each the fact that fires."""

    logits: Tensor
    fired: list[Match | None]


@dataclass(frozen=True)
class _Read:
    """Rows of one length that have been read in."""

    places: list[int]
    tokens: int
    cache: DynamicCache


class Decoding:
    """The running rows. Weights must stay as they are while there are any.

    The positions that the model has are not checked: a row must leave before it outgrows them.
    """

    def __init__(self, model: EditableModel, side: SideMemory | None) -> None:
        """`side`: laid over the rows that it concerns; None: over none."""
        self.model, self.side = model, side
        self._tokens: list[int] = []  # of each row, in the cache
        self._deltas: list[Delta | None] = []
        self._cache = DynamicCache()

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def width(self) -> int:
        """Columns of the cache: the tokens of the longest row."""
        return max(self._tokens, default=0)

    def join(self, prompts: Sequence[Sequence[int]]) -> Joined:
        """Read prompts in, token ids of one or more tokens each; they become the last rows. If it
        fails, the rows that run are what they were."""
        logits: list[Tensor | None] = [None] * len(prompts)
        fired: list[Match | None] = [None] * len(prompts)
        read = []
        for places in equally_long(prompts):
            ids = torch.tensor([prompts[n] for n in places], device=self.model.device)
            found: list[Match | None] = []
            cache = DynamicCache()
            with self.side.overlay(found) if self.side is not None else nullcontext():
                out = self._pass(ids, cache)
            read.append(_Read(places, ids.shape[1], cache))
            for row, n in enumerate(places):
                logits[n] = out[row]
                fired[n] = found[row] if found else None
        joined = Joined(torch.stack([row for row in logits if row is not None]), fired)
        deltas = [None if match is None else self._delta(match) for match in fired]
        self._take_in(read)  # last: from here on nothing fails
        self._deltas += deltas
        return joined

    def _delta(self, match: Match) -> Delta | None:
        return None if self.side is None else self.side.shards[match.shard].delta

    def _take_in(self, read: Sequence[_Read]) -> None:
        """Lay what was read in beside what runs, in the order of the prompts."""
        order = torch.tensor([n for part in read for n in part.places]).argsort()
        tokens = [part.tokens for part in read for _ in part.places]
        width = max([self.width, *tokens])
        places = torch.cat([torch.arange(len(self)), order + len(self)]).to(self.model.device)
        caches = [*([self._cache] if len(self) else []), *(part.cache for part in read)]
        joined = []
        for layer in zip(*caches, strict=True):
            keys = torch.cat([_widened(keys, width) for keys, *_ in layer])[places]
            values = torch.cat([_widened(values, width) for _, values, *_ in layer])[places]
            joined.append((keys, values))
        self._cache = DynamicCache(joined)
        self._tokens += [tokens[n] for n in order.tolist()]

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Give each row one more token; next-token logits (rows, vocabulary)."""
        device, width = self.model.device, self.width
        ids = torch.tensor(tokens, device=device)[:, None]
        held = torch.tensor(self._tokens, device=device)[:, None]  # also the next position
        seen = torch.arange(width + 1, device=device) >= width - held  # (rows, width + 1)
        with self.side.laid(self._deltas) if self.side is not None else nullcontext():
            logits = self._pass(ids, self._cache, attention_mask=seen.long(), position_ids=held)
        self._tokens = [n + 1 for n in self._tokens]
        return logits

    def keep(self, places: Sequence[int]) -> None:
        """Let all rows leave but those at some places, and the pads that no row needs any more."""
        if len(places) == len(self):
            return
        before = self.width
        self._tokens = [self._tokens[n] for n in places]
        self._deltas = [self._deltas[n] for n in places]
        chosen = torch.tensor(places, dtype=torch.long, device=self.model.device)
        spare = before - self.width
        kept = [(k[chosen, :, spare:], v[chosen, :, spare:]) for k, v, *_ in self._cache]
        self._cache = DynamicCache(kept)

    def _pass(self, ids: Tensor, cache: DynamicCache, **more: Tensor) -> Tensor:
        """ids (rows, tokens) -> logits (rows, vocabulary) of their last column; the cache grows."""
        with torch.no_grad():
            out = self.model.model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **more
            )
        logits: Tensor = out.logits[:, -1]
        return logits


def _widened(states: Tensor, tokens: int) -> Tensor:
    """Keys or values (rows, heads, tokens, width of a head) with pads on the left, until there
    are so many tokens."""
    return pad(states, (0, 0, tokens - states.shape[2], 0))
