"""Rows of facts that learn side by side, run together on each fact's own ΔW."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from memory.model.editable import EditableModel
from memory.model.prefix_cache import PrefixCache
from memory.side.shards import Delta
from policies.divergence import stop_non_finite
from policies.prompts import IGNORE_LABEL, TokenRow

ROWS_PER_PASS = 16  # padded to the longest of them
MAX_PADS = 16  # of a row in such a pass: a chat's template makes its rows several times as long
# What a pass costs beside its tokens, in tokens: it reads the weights. (SmolLM2-135M on one core:
# 15 to 40; on a GPU many more.)
PASS_TOKENS = 32


def group_by_target(
    pairs: Sequence[tuple[int, TokenRow]],
) -> list[list[tuple[int, TokenRow]]]:
    """Group pairs of a fact's index and a row by the length of the targets.

    A row is padded to the longest of its group: a group joins the next longer one where its pads
    cost less than a pass of its own. Prompts are not compared: what stands before the target is
    computed once, and costs a pass little.
    """
    by_length: dict[int, list[tuple[int, TokenRow]]] = {}
    for pair in sorted(pairs, key=lambda pair: len(pair[1].target)):
        by_length.setdefault(len(pair[1].target), []).append(pair)
    groups: list[list[tuple[int, TokenRow]]] = []
    for length, group in by_length.items():
        pads = sum(length - len(row.target) for _, row in groups[-1]) if groups else PASS_TOKENS
        if pads < PASS_TOKENS:
            groups[-1].extend(group)
        else:
            groups.append(group)
    return groups


def split_passes(lengths: Sequence[int]) -> list[slice]:
    """Split rows, by their ascending lengths, into passes of few pads."""
    starts = [0]
    for n, length in enumerate(lengths):
        if n - starts[-1] >= ROWS_PER_PASS or length > lengths[starts[-1]] + MAX_PADS:
            starts.append(n)
    return [slice(a, b) for a, b in pairwise([*starts, len(lengths)])]


class RowGroup:
    """Rows of facts that run together, padded to the longest of them."""

    def __init__(
        self, model: EditableModel, layer: int, pairs: Sequence[tuple[int, TokenRow]], facts: int
    ) -> None:
        """pairs: a fact's index and a row, for `facts` facts; layer: the one that ΔW changes."""
        self.model, self.layer, device = model, layer, model.device
        pairs = sorted(pairs, key=lambda pair: pair[1].prompt_length)  # a pass has few pads then
        rows = [row for _, row in pairs]
        self.row_owner = torch.tensor([n for n, _ in pairs], device=device)  # (rows,) of facts
        self.is_own_row = self.row_owner == torch.arange(facts, device=device)[:, None]
        heads = [row.prompt[:-1] for row in rows]
        tails = [row.ids[row.prompt_length - 1 : -1] for row in rows]
        longest = max(map(len, tails))
        self.replay = PrefixCache(model, layer, len(rows), max(map(len, heads)), longest)
        for part in split_passes([len(head) for head in heads]):
            self.replay.fill_rows(part.start, heads[part], tails[part])
        self.columns = torch.arange(longest, device=device).repeat(len(rows), 1)
        self.labels = torch.full((len(rows), longest), IGNORE_LABEL, device=device)
        for n, row in enumerate(rows):
            self.labels[n, : len(row.target)] = torch.tensor(row.target)
        self.is_target = self.labels != IGNORE_LABEL  # (rows, columns)
        self.is_own_token = self.is_own_row[:, self.is_target.nonzero()[:, 0]]  # (facts, tokens)
        self.end_inputs = self._read_end_inputs()  # (rows, width)

    def _read_end_inputs(self) -> Tensor:
        """Return inputs (rows, width) where the prompts end; no ΔW changes these."""
        caught: list[Tensor] = []
        taps = {self.layer: lambda k, _y: caught.append(k[:, 0])}
        with torch.no_grad(), self.model.tap_layers(taps):
            self.replay.logits(self.columns[:, :1])
        return caught[0]

    def evaluate_tokens(self, deltas: Delta) -> tuple[Tensor, Tensor]:
        """Return the cross-entropies (tokens,) of the targets' tokens under each fact's ΔW, and
        which of these are not the argmax."""
        # Not by advanced indexing, whose backward is slow.
        of_rows = Delta(*(d.index_select(0, self.row_owner) for d in (deltas.up, deltas.down)))

        def tap(inputs: Tensor, outputs: Tensor) -> Tensor:
            return outputs + of_rows.apply_to(inputs.detach())  # routed from the prompt's end on

        with self.model.tap_layers({self.layer: tap}):
            logits = self.replay.logits(self.columns)
        picked = stop_non_finite(logits[self.is_target].float())
        labels = self.labels[self.is_target]
        losses = F.cross_entropy(picked, labels, reduction="none")
        return losses, picked.argmax(-1) != labels
