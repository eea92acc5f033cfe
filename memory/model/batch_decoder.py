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
from memory.model.generate import group_by_length
from memory.side.side_memory import Delta, RoutingMatch, SideMemory


@dataclass(frozen=True)
class PrefilledRows:
    """Rows that have been read in: next-token logits (rows, vocabulary) where they end, and for
    each the fact that fires."""

    logits: Tensor
    matches: list[RoutingMatch | None]


@dataclass(frozen=True)
class _PrefilledGroup:
    """Rows of one length that have been read in."""

    row_indices: list[int]
    prompt_length: int
    cache: DynamicCache


class BatchDecoder:
    """The running rows. Weights must stay as they are while there are any.

    The positions that the model has are not checked: a row must leave before it outgrows them.
    """

    def __init__(self, model: EditableModel, side: SideMemory | None) -> None:
        """`side`: laid over the rows that it concerns; None: over none."""
        self.model, self.side_memory = model, side
        self._row_lengths: list[int] = []  # of each row, in the cache
        self._row_deltas: list[Delta | None] = []
        self._cache = DynamicCache()

    def __len__(self) -> int:
        return len(self._row_lengths)

    @property
    def cache_width(self) -> int:
        """Columns of the cache: the tokens of the longest row."""
        return max(self._row_lengths, default=0)

    def prefill_rows(self, prompts: Sequence[Sequence[int]]) -> PrefilledRows:
        """Read prompts in, token ids of one or more tokens each; they become the last rows. If it
        fails, the rows that run are what they were."""
        logits: list[Tensor | None] = [None] * len(prompts)
        fired: list[RoutingMatch | None] = [None] * len(prompts)
        read = []
        for places in group_by_length(prompts):
            ids = torch.tensor([prompts[n] for n in places], device=self.model.device)
            found: list[RoutingMatch | None] = []
            cache = DynamicCache()
            with (
                self.side_memory.overlay_matches(found)
                if self.side_memory is not None
                else nullcontext()
            ):
                out = self._run_model(ids, cache)
            read.append(_PrefilledGroup(places, ids.shape[1], cache))
            for row, n in enumerate(places):
                logits[n] = out[row]
                fired[n] = found[row] if found else None
        joined = PrefilledRows(torch.stack([row for row in logits if row is not None]), fired)
        deltas = [None if match is None else self._find_delta(match) for match in fired]
        self._append_rows(read)  # last: from here on nothing fails
        self._row_deltas += deltas
        return joined

    def _find_delta(self, match: RoutingMatch) -> Delta | None:
        return None if self.side_memory is None else self.side_memory.shards[match.shard_id].delta

    def _append_rows(self, read: Sequence[_PrefilledGroup]) -> None:
        """Lay what was read in beside what runs, in the order of the prompts."""
        order = torch.tensor([n for part in read for n in part.row_indices]).argsort()
        tokens = [part.prompt_length for part in read for _ in part.row_indices]
        width = max([self.cache_width, *tokens])
        places = torch.cat([torch.arange(len(self)), order + len(self)]).to(self.model.device)
        caches = [*([self._cache] if len(self) else []), *(part.cache for part in read)]
        joined = []
        for layer in zip(*caches, strict=True):
            keys = torch.cat([_pad_left(keys, width) for keys, *_ in layer])[places]
            values = torch.cat([_pad_left(values, width) for _, values, *_ in layer])[places]
            joined.append((keys, values))
        self._cache = DynamicCache(joined)
        self._row_lengths += [tokens[n] for n in order.tolist()]

    def decode_step(self, tokens: Sequence[int]) -> Tensor:
        """Give each row one more token; next-token logits (rows, vocabulary)."""
        device, width = self.model.device, self.cache_width
        ids = torch.tensor(tokens, device=device)[:, None]
        held = torch.tensor(self._row_lengths, device=device)[:, None]  # also the next position
        seen = torch.arange(width + 1, device=device) >= width - held  # (rows, width + 1)
        with (
            self.side_memory.overlay_deltas(self._row_deltas)
            if self.side_memory is not None
            else nullcontext()
        ):
            logits = self._run_model(
                ids, self._cache, attention_mask=seen.long(), position_ids=held
            )
        self._row_lengths = [n + 1 for n in self._row_lengths]
        return logits

    def keep_rows(self, places: Sequence[int]) -> None:
        """Let all rows leave but those at some places, and the pads that no row needs any more."""
        if len(places) == len(self):
            return
        before = self.cache_width
        self._row_lengths = [self._row_lengths[n] for n in places]
        self._row_deltas = [self._row_deltas[n] for n in places]
        chosen = torch.tensor(places, dtype=torch.long, device=self.model.device)
        spare = before - self.cache_width
        kept = [(k[chosen, :, spare:], v[chosen, :, spare:]) for k, v, *_ in self._cache]
        self._cache = DynamicCache(kept)

    def _run_model(self, ids: Tensor, cache: DynamicCache, **more: Tensor) -> Tensor:
        """ids (rows, tokens) -> logits (rows, vocabulary) of their last column; the cache grows."""
        with torch.no_grad():
            out = self.model.hf_model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **more
            )
        logits: Tensor = out.logits[:, -1]
        return logits


def _pad_left(states: Tensor, tokens: int) -> Tensor:
    """Keys or values (rows, heads, tokens, width of a head) with pads on the left, until there
    are so many tokens."""
    return pad(states, (0, 0, tokens - states.shape[2], 0))
