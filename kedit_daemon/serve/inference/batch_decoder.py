"""Continuous batching: rows share one KV cache, and join and leave between any two steps.

A row is prefilled alone or with others of its length, so that no pad is ever routed or attended
to; its keys and values are then appended to the running batch, padded on the left under a mask.
The side memory's delta for a row is decided at prefill, and within a chat's reply where it comes to
state a fact; a row keeps the one that fires, though the side memory may change meanwhile. Knows
nothing of how a token is chosen.
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
from memory.side.prompt_forms import choose_prompt
from memory.side.row_overlay import RowOverlay
from memory.side.row_state import RowState
from memory.side.shards import RoutingMatch
from memory.side.side_memory import SideMemory


@dataclass(frozen=True)
class PrefilledRows:
    """Next-token logits (rows, vocabulary) of prefilled rows, and their state under the side
    memory; None without one."""

    logits: Tensor
    rows: list[RowState | None]

    @property
    def matches(self) -> list[RoutingMatch | None]:
        """The fact that fires for each row."""
        return [None if row is None else row.match for row in self.rows]


@dataclass(frozen=True)
class _PrefilledGroup:
    """Prefilled rows of one length."""

    row_indices: list[int]
    prompt_length: int
    cache: DynamicCache


class BatchDecoder:
    """The running rows. Weights must not change while there are any.

    The model's maximum position is not checked: a row must leave before it is reached.
    """

    def __init__(self, model: EditableModel, side: SideMemory | None) -> None:
        """`side` changes the rows that one of its facts fires for; None decodes without it."""
        self.model, self.side_memory = model, side
        self._row_lengths: list[int] = []  # of each row, in the cache
        self._saved_places: list[int] = []  # of each row: pictures take fewer than they have tokens
        self._rows: list[RowState] = []  # under the side memory, if there is one
        self._cache = DynamicCache()

    def __len__(self) -> int:
        return len(self._row_lengths)

    @property
    def cache_width(self) -> int:
        """Columns of the cache: the tokens of the longest row."""
        return max(self._row_lengths, default=0)

    def prefill_rows(self, prompts: Sequence[Sequence[int]]) -> PrefilledRows:
        """Prefill prompts of one or more token ids each, and append them as the last rows. A
        failure leaves the running rows unchanged."""
        if not prompts:
            return PrefilledRows(torch.empty(0, 0, device=self.model.device), [])
        if self.side_memory is not None:
            prompts = [choose_prompt(self.side_memory, ids) for ids in prompts]
        logits: list[Tensor | None] = [None] * len(prompts)
        rows: list[RowState | None] = [None] * len(prompts)
        groups, side = [], self.side_memory
        for places in group_by_length(prompts):
            ids = torch.tensor([prompts[n] for n in places], device=self.model.device)
            overlay = None if side is None else RowOverlay(side)
            cache = DynamicCache()
            with overlay.read_prompts(ids.tolist()) if overlay else nullcontext():
                out = self._run_model(ids, cache)
            groups.append(_PrefilledGroup(places, ids.shape[1], cache))
            for row, n in enumerate(places):
                logits[n] = out[row]
                if overlay:
                    rows[n] = overlay.rows[row]
        result = PrefilledRows(torch.stack([row for row in logits if row is not None]), rows)
        saved = [self.model.count_saved_positions(ids) for ids in prompts]
        self._append_groups(groups)  # last: from here on nothing fails
        self._saved_places += saved
        self._rows += [row for row in rows if row is not None]
        return result

    def _append_groups(self, groups: Sequence[_PrefilledGroup]) -> None:
        """Append prefilled rows to the running ones, in the order of the prompts."""
        order = torch.tensor([n for part in groups for n in part.row_indices]).argsort()
        tokens = [part.prompt_length for part in groups for _ in part.row_indices]
        width = max([self.cache_width, *tokens])
        places = torch.cat([torch.arange(len(self)), order + len(self)]).to(self.model.device)
        caches = [*([self._cache] if len(self) else []), *(part.cache for part in groups)]
        joined = []
        for layer in zip(*caches, strict=True):
            keys = torch.cat([_pad_left(keys, width) for keys, *_ in layer])[places]
            values = torch.cat([_pad_left(values, width) for _, values, *_ in layer])[places]
            joined.append((keys, values))
        self._cache = DynamicCache(joined)
        self._row_lengths += [tokens[n] for n in order.tolist()]

    def decode_step(self, tokens: Sequence[int]) -> Tensor:
        """Feed one token to each row, and return next-token logits (rows, vocabulary)."""
        device, width = self.model.device, self.cache_width
        ids = torch.tensor(tokens, device=device)[:, None]
        lengths = torch.tensor(self._row_lengths, device=device)[:, None]
        places = lengths - torch.tensor(self._saved_places, device=device)[:, None]
        seen = torch.arange(width + 1, device=device) >= width - lengths  # (rows, width + 1)
        side, masks = self.side_memory, {"attention_mask": seen.long(), "position_ids": places}
        overlay = None if side is None else RowOverlay(side, self._rows)
        if overlay:
            overlay.add_tokens(tokens)
        with overlay.apply_deltas() if overlay else nullcontext():
            logits = self._run_model(ids, self._cache, **masks)
        self._row_lengths = [n + 1 for n in self._row_lengths]
        return logits

    def keep_rows(self, places: Sequence[int]) -> None:
        """Keep only the rows at these places, and drop pads that none of them needs."""
        if len(places) == len(self):
            return
        before = self.cache_width
        self._row_lengths = [self._row_lengths[n] for n in places]
        self._saved_places = [self._saved_places[n] for n in places]
        if self.side_memory is not None:
            self._rows = [self._rows[n] for n in places]
        chosen = torch.tensor(places, dtype=torch.long, device=self.model.device)
        spare = before - self.cache_width
        kept = [(k[chosen, :, spare:], v[chosen, :, spare:]) for k, v, *_ in self._cache]
        self._cache = DynamicCache(kept)

    def _run_model(self, ids: Tensor, cache: DynamicCache, **more: Tensor) -> Tensor:
        """Return logits (rows, vocabulary) of the last column of ids (rows, tokens)."""
        with torch.no_grad():
            out = self.model.hf_model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **more
            )
        logits: Tensor = out.logits[:, -1]
        return logits


def _pad_left(states: Tensor, tokens: int) -> Tensor:
    """Pad keys or values (rows, heads, tokens, head size) on the left to a count of tokens."""
    return pad(states, (0, 0, tokens - states.shape[2], 0))
