"""Rows of facts that learn side by side, run together on each fact's own ΔW."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from memory.model.editable import EditableModel
from memory.model.prefix_cache import PrefixCache
from memory.side.shards import Delta
from policies.divergence import stop_non_finite
from policies.prompts import IGNORE_LABEL, TokenRow

ROWS_PER_PASS = 16  # padded to the longest of them


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
        for first in range(0, len(rows), ROWS_PER_PASS):
            part = slice(first, first + ROWS_PER_PASS)
            self.replay.fill_rows(first, heads[part], tails[part])
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
