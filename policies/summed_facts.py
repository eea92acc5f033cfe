"""Sums over facts, KᵀK and KᵀR by layer, which facts join and leave without a trace.

A solve then multiplies what changed, however many facts live beside it. Sums of floating-point
numbers would depend on their order; here every entry is a multiple of one power of two, so coarse
that float64 holds each sum of products exactly. The same facts have the same sums, bit for bit,
whatever joined and left before.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Steps of a typical entry, as powers of two. Keys are kept in bfloat16, which has fewer bits.
KEY_BITS, RESIDUAL_BITS = 14, 17
EXACT_BITS = 53  # of float64
FACTS_PER_PRODUCT = 256

LayerTerms = tuple[Tensor, Tensor]
"""Keys (rows, width) and residuals (rows, hidden) of some facts in one layer."""


@dataclass(frozen=True)
class Grid:
    """Powers of two of which the entries of a layer's keys and residuals are multiples."""

    key_step: float
    residual_step: float

    @classmethod
    def measure(cls, key_size: float, residual_size: float) -> "Grid":
        """Choose the steps for typical entries of these sizes."""
        steps = ((key_size, KEY_BITS), (residual_size, RESIDUAL_BITS))
        return cls(*(2.0 ** (round(math.log2(size or 1.0)) - bits) for size, bits in steps))

    def round_keys(self, keys: Tensor) -> Tensor:
        """Return the nearest keys on the grid, in float64."""
        return (keys.double().cpu() / self.key_step).round() * self.key_step

    def round_residuals(self, residuals: Tensor) -> Tensor:
        """Return the nearest residuals on the grid, in float64."""
        return (residuals.double().cpu() / self.residual_step).round() * self.residual_step


class LayerSums:
    """KᵀK (width, width) and KᵀR (width, hidden) of one layer's rows on a grid, in float64."""

    def __init__(self, width: int, hidden: int, grid: Grid) -> None:
        self.grid = grid
        self.gram = torch.zeros(width, width, dtype=torch.float64)
        self.cross = torch.zeros(width, hidden, dtype=torch.float64)
        self._residual_squares = torch.zeros(hidden, dtype=torch.float64)

    def add(self, keys: Tensor, residuals: Tensor, sign: int) -> None:
        """Add the rows of some facts, or take them out with sign -1."""
        self.gram.addmm_(keys.T, keys, alpha=sign)
        self.cross.addmm_(keys.T, residuals, alpha=sign)
        self._residual_squares += sign * residuals.square().sum(0)

    @property
    def is_exact(self) -> bool:
        """Check that no sum can have been rounded: by Cauchy and Schwarz, none is larger than the
        largest sums of squares."""
        k, r = float(self.gram.diagonal().max()), float(self._residual_squares.clamp(min=0).max())
        if not (math.isfinite(k) and math.isfinite(r)):
            return False
        key = math.sqrt(k) / self.grid.key_step
        return key * max(key, math.sqrt(r) / self.grid.residual_step) < 2.0**EXACT_BITS


class SummedFacts:
    """The sums of all edited layers over the facts that were asked for last."""

    def __init__(
        self,
        make_sums: Callable[[], Mapping[int, LayerSums]],
        read_rows: Callable[[Sequence[bytes]], Mapping[int, LayerTerms]],
    ) -> None:
        """make_sums: of no facts, by layer. read_rows: reads the rows of some facts, on the grids,
        from their packed terms, by layer."""
        self._make_sums, self._read_rows = make_sums, read_rows
        self._sums: Mapping[int, LayerSums] = {}
        self._members: dict[str, int] = {}  # hashes of the terms by fact id

    def sum_over(
        self, terms: Mapping[str, bytes], read_gone: Callable[[str], bytes | None]
    ) -> Mapping[int, LayerSums]:
        """Return the sums over facts, from their packed terms by id. read_gone: reads the terms of
        a fact that is no longer among them; None if they are lost."""
        wanted = {fact_id: hash(blob) for fact_id, blob in terms.items()}
        left = [n for n, known in self._members.items() if wanted.get(n) != known]
        gone = {n: blob for n in left if (blob := read_gone(n)) is not None}
        can_change = all(n in gone and hash(gone[n]) == self._members[n] for n in left)
        new = [n for n in sorted(wanted) if self._members.get(n) != wanted[n]]
        self._members = {}
        changes = can_change and len(left) + len(new) < len(wanted)
        if changes:
            self._add([gone[n] for n in left], -1)
            self._add([terms[n] for n in new], 1)
        if not changes or not self._are_exact:
            self._add_all(terms)
        if self._are_exact:  # others are summed in one order at least, and are not changed
            self._members = wanted
        return self._sums

    @property
    def _are_exact(self) -> bool:
        return all(sums.is_exact for sums in self._sums.values())

    def _add_all(self, terms: Mapping[str, bytes]) -> None:
        self._sums = {}  # never both
        self._sums = self._make_sums()
        self._add([terms[n] for n in sorted(terms)], 1)

    def _add(self, blobs: Sequence[bytes], sign: int) -> None:
        for first in range(0, len(blobs), FACTS_PER_PRODUCT):
            part = blobs[first : first + FACTS_PER_PRODUCT]
            for layer, (keys, residuals) in self._read_rows(part).items():
                self._sums[layer].add(keys, residuals, sign)
