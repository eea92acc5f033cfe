"""Cache of rows' unchanged prefixes, for optimisations that run the same rows again and again.

A change at a token leaves all tokens before it unchanged. So the part of a row before the first
changed token is kept as keys and values of the attention, the part from there on as the residual
stream that enters the first changed block; a pass then runs the row's last tokens in the blocks
that can still differ, and the head only where its output is read.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from memory.model.editable import EditableModel
from memory.picture_marks import FIRST_PICTURE_ID

MIN_SHARED_TOKENS = 16  # at the beginning of rows, from which on they are computed once


class PrefixCache:
    """A fixed number of rows of one shape, each replaceable.

    A row is a head of at most `head` tokens, left padded, and a tail of at most `tail`, right
    padded. Since the shape is fixed, a row's output does not depend on its neighbours, only (in the
    last bits) on the rows that were filled together with it.
    """

    def __init__(self, model: EditableModel, layer: int, rows: int, head: int, tail: int) -> None:
        """`layer` is the first block that is run again."""
        self.model, self.layer = model, layer
        self.head_length, self.tail_length = head, tail
        on = model.device
        self.tail_ids = torch.zeros(rows, tail, dtype=torch.long, device=on)
        self.tail_positions = torch.arange(tail, device=on).repeat(rows, 1)
        self.attention_mask = torch.ones(rows, head + tail, dtype=torch.long, device=on)
        self.layer_inputs = torch.zeros(rows, tail, model.hidden_size, device=on, dtype=model.dtype)
        # By layer: keys and values (rows, heads, head, size).
        self._head_states: dict[int, tuple[Tensor, Tensor]] = {}

    def fill_rows(
        self, first: int, heads: Sequence[Sequence[int]], tails: Sequence[Sequence[int]]
    ) -> None:
        """Replace rows from `first` on, and compute their unchanged part."""
        ids = torch.zeros(len(heads), self.head_length + self.tail_length, dtype=torch.long)
        mask = torch.zeros_like(ids)
        positions = torch.zeros_like(ids)
        for n, (before, after) in enumerate(zip(heads, tails, strict=True)):
            start, end = self.head_length - len(before), self.head_length + len(after)
            ids[n, start:end] = torch.tensor([*before, *after])
            mask[n, start:end] = 1
            saved = self.model.count_saved_positions(before)
            positions[n, start:] = torch.arange(ids.shape[1] - start) - saved
            if saved:
                positions[n, start : self.head_length] = torch.tensor(
                    self.model.place_tokens(before)
                )
        # Pads on the right may be beyond the last position.
        positions.clamp_(max=self.model.max_positions - 1)
        mask[:, self.head_length :] = 1  # only pads attend to pads on the right
        ids, mask, positions = (t.to(self.model.device) for t in (ids, mask, positions))
        # Columns that are pads in all of these rows are not computed.
        pads = self.head_length - max(map(len, heads))
        ids_read, mask_read, positions_read = (t[:, pads:] for t in (ids, mask, positions))
        shared = _find_shared_start(heads)
        past = self._run_start(shared, [max(map(len, heads)) - len(head) for head in heads])
        start = len(shared) if past is not None else 0
        hidden, cache = self.model.capture_layer_input(
            self.layer, ids_read[:, start:], mask_read, positions_read[:, start:], past
        )
        at = slice(first, first + len(heads))
        self.tail_ids[at] = ids[:, self.head_length :]
        self.tail_positions[at] = positions[:, self.head_length :]
        self.attention_mask[at] = mask
        self.layer_inputs[at] = hidden[:, hidden.shape[1] - self.tail_length :]
        for n in {0, *range(self.layer, self.model.layer_count)}:
            states = zip(self._allocate_states(n, cache), _layer_states(cache, n), strict=True)
            for kept, new in states:
                kept[at] = 0
                kept[at, :, pads:] = new[:, :, : self.head_length - pads]

    def _run_start(self, shared: Sequence[int], pads: Sequence[int]) -> DynamicCache | None:
        """Compute the tokens with which all rows begin once, and return their states in each row,
        behind its `pads`, as many columns as there are tokens; None where it is not worth it."""
        if len(pads) < 2 or len(shared) < MIN_SHARED_TOKENS:
            return None
        if any(token >= FIRST_PICTURE_ID for token in shared):
            return None  # in some models its tokens see each other, and are run together
        ids = torch.tensor([list(shared)], device=self.model.device)
        places = torch.arange(len(shared), device=self.model.device)[None]
        _, cache = self.model.capture_layer_input(self.layer, ids, torch.ones_like(ids), places)
        moved = []
        for n in range(self.model.layer_count):
            rows = []
            for kept in _layer_states(cache, n):  # (1, heads, tokens, size)
                shifted = kept.new_zeros(len(pads), *kept.shape[1:])
                for row, pad in enumerate(pads):
                    shifted[row, :, pad:] = kept[0, :, : max(len(shared) - pad, 0)]
                rows.append(shifted)
            moved.append((rows[0], rows[1]))
        return DynamicCache(moved)

    def _allocate_states(self, layer: int, cache: DynamicCache) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, allocated when their shape is first known."""
        if layer not in self._head_states:
            like = [
                s.new_zeros(len(self.tail_ids), s.shape[1], self.head_length, s.shape[3])
                for s in _layer_states(cache, layer)
            ]
            self._head_states[layer] = (like[0], like[1])
        return self._head_states[layer]

    def logits(self, columns: Tensor) -> Tensor:
        """Compute logits (rows, n, vocabulary) at the tail's columns (rows, n), with gradients."""
        kept = [self._head_states.get(n, (None, None)) for n in range(self.model.layer_count)]
        cache = DynamicCache(kept)
        with (
            _project_columns(self.model, columns),
            self.model.skip_layers_below(self.layer, self.layer_inputs),
        ):
            out = self.model.hf_model(
                input_ids=self.tail_ids,
                attention_mask=self.attention_mask,
                position_ids=self.tail_positions,
                past_key_values=cache,
                use_cache=True,
            )
        return cast(Tensor, out.logits)


def _find_shared_start(heads: Sequence[Sequence[int]]) -> Sequence[int]:
    """Return the tokens with which all heads begin."""
    first, last = min(heads, key=list), max(heads, key=list)
    pairs = enumerate(zip(first, last, strict=False))
    return first[: next((n for n, (a, b) in pairs if a != b), min(len(first), len(last)))]


def _layer_states(cache: DynamicCache, layer: int) -> tuple[Tensor, Tensor]:
    kept = cast(DynamicLayer, cache.layers[layer])
    return cast(Tensor, kept.keys), cast(Tensor, kept.values)


@contextmanager
def _project_columns(model: EditableModel, columns: Tensor) -> Iterator[None]:
    """Run the output head on the chosen columns only."""
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    handle = model.hf_model.get_output_embeddings().register_forward_pre_hook(
        lambda _module, args: (args[0][rows, columns],)
    )
    try:
        yield
    finally:
        handle.remove()
