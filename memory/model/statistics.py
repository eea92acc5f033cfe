"""Statistics of ordinary text inside the model, by layer: key covariance, means, norms, sinks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import cast

import torch
from safetensors.torch import load, save
from torch import Tensor

from memory.errors import KeditError
from memory.model.editable import EditableModel
from memory.model.generate import group_by_length

ROW_TOKENS = 256
ROWS_PER_PRODUCT = 16  # rows whose keys go into one product
PACK_FORMAT = 3  # version of the form that `pack_statistics` writes
CHOLESKY_LIFTS = (1e-5, 1e-4, 1e-3, 1e-2)  # of the mean of C0's diagonal, below any ridge
NAMES_WEIGHT = 1.0  # of the keys of names, to those of ordinary text
FIRST_POSITION = 1  # positions before it are left out: the first token acts as an attention sink
# Least median cosine of the first tokens' keys with their mean, where they are a sink's.
SINK_COSINE = 0.9


@dataclass(frozen=True)
class PackedCovariance:
    """C0's Cholesky factor L in 8 bits: `entries` of the lower triangle, row by row, in units of
    their column's `scale` (width,). An eighth of C0's size."""

    entries: Tensor
    scale: Tensor

    def unpack(self) -> Tensor:
        """Compute C0 = L Lᵀ (width, width) in float32."""
        factor = torch.zeros(len(self.scale), len(self.scale))
        rows, columns = torch.tril_indices(*factor.shape)
        factor[rows, columns] = self.entries.float()
        factor *= self.scale
        return factor @ factor.T


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics over the tokens of ordinary text at one down projection.

    key_covariance: C0, of the tokens of ordinary text and of names' last ones, which is where
    edits are made; packed where it is seldom needed; empty (0, 0) for a layer that is only read.
    output_mean: E[y] (hidden,). median_norm: of ‖y‖, since a few tokens are attention sinks with
    enormous activations. sink_key: the mean key of texts' first tokens (width,), where it is the
    same whatever they are, else empty (0,). A model writes its attention sink there (Sun et al.
    2024, "Massive activations in large language models"), and C0 does not hold it, since it leaves
    the first position out.
    """

    key_covariance: Tensor | PackedCovariance
    output_mean: Tensor
    median_norm: float
    sink_key: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def has_covariance(self) -> bool:
        """Check that C0 is known."""
        packed = isinstance(self.key_covariance, PackedCovariance)
        return packed or len(cast(Tensor, self.key_covariance)) > 0

    @property
    def covariance(self) -> Tensor:
        """C0 = E[k kᵀ] (width, width) float32, not centred, as in MEMIT (Meng et al. 2023), where
        it is of text alone; empty (0, 0) for a layer that is only read. Unpacked anew each time."""
        kept = self.key_covariance
        return kept.unpack() if isinstance(kept, PackedCovariance) else kept


class _LayerSums:
    """Sums over the tokens of one layer."""

    def __init__(self, width: int, hidden: int) -> None:
        self.second_moment = torch.zeros(width, width, dtype=torch.float64)
        self.output_sum = torch.zeros(hidden, dtype=torch.float64)
        self.output_norms: list[Tensor] = []
        self.end_moment = torch.zeros_like(self.second_moment)
        self._pending_keys: list[Tensor] = []
        self._first_keys: list[Tensor] = []

    def add_row(self, inputs: Tensor, outputs: Tensor) -> None:
        values = outputs[0, FIRST_POSITION:].double().cpu()  # (tokens, hidden)
        self.output_sum += values.sum(0)
        self.output_norms.append(values.norm(dim=1))
        if len(self.second_moment):
            self._first_keys.append(inputs[0, 0].cpu())
            self._pending_keys.append(inputs[0, FIRST_POSITION:])
            if len(self._pending_keys) == ROWS_PER_PRODUCT:
                self.fold_keys()

    def add_ends(self, inputs: Tensor, _outputs: Tensor) -> None:
        """Add the keys where texts (rows, tokens, width) end."""
        ends = inputs[:, -1]
        self.end_moment += (ends.T @ ends).cpu()

    def fold_keys(self) -> None:
        """Add the pending keys: float32 within a product, float64 over the products."""
        if self._pending_keys:
            keys = torch.cat(self._pending_keys)  # (tokens, width)
            self.second_moment += (keys.T @ keys).cpu()
            self._pending_keys.clear()

    def to_statistics(self, count: int, ends: int) -> LayerStatistics:
        """Return the means over `count` tokens of text, and over the ends of `ends` names."""
        self.fold_keys()
        norm = float(torch.cat(self.output_norms).median())
        return LayerStatistics(
            self._average_keys(count, ends).float(),
            (self.output_sum / count).float(),
            norm,
            self._average_sink_key(),
        )

    def _average_keys(self, count: int, ends: int) -> Tensor:
        """Return C0 in float64: of the text alone if there are no names."""
        of_text = self.second_moment / count
        if not ends:
            return of_text
        return (of_text + NAMES_WEIGHT * self.end_moment / ends) / (1 + NAMES_WEIGHT)

    def _average_sink_key(self) -> Tensor:
        """Return the mean of the first tokens' keys if they agree, else an empty tensor."""
        if len(self._first_keys) < 2:
            return torch.empty(0)
        keys = torch.stack(self._first_keys)  # (texts, width)
        mean = keys.mean(0)
        agreement = torch.cosine_similarity(keys, mean[None]).median()
        return mean if agreement >= SINK_COSINE else torch.empty(0)


def collect_statistics(
    model: EditableModel,
    lines: Sequence[str],
    edited: Iterable[int],
    read: Iterable[int] = (),
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
    names: Sequence[str] = (),
) -> dict[int, LayerStatistics]:
    """Measure layers over the lines, joined into rows of ROW_TOKENS.

    The layers of `edited` get a covariance, those of `read` do not. names: texts that end in one,
    whose last keys count NAMES_WEIGHT times as much as the text's in the covariance. Raises
    KeditError when the text is too short for one row.
    """
    wide = set(edited)
    sums = {
        n: _LayerSums(model.weight(n).shape[1] if n in wide else 0, model.hidden_size)
        for n in sorted({*wide, *read})
    }

    def add_activations(layer: int, inputs: Tensor, outputs: Tensor) -> None:
        sums[layer].add_row(inputs, outputs)

    count, row = 0, list[int]()
    with torch.no_grad(), model.tap_layers({n: partial(add_activations, n) for n in sums}):
        for line in progress(lines):
            row += model.encode(line)
            if len(row) < ROW_TOKENS:
                continue
            count += ROW_TOKENS - FIRST_POSITION
            ids = torch.tensor([row[:ROW_TOKENS]], device=model.device)
            model.run_to_layer(ids, max(sums))
            row = []
    if not count:
        raise KeditError(f"less than {ROW_TOKENS} tokens of text to measure", code="statistics")
    _add_names(model, sums, names)
    return {n: layer.to_statistics(count, len(names)) for n, layer in sums.items()}


def _add_names(model: EditableModel, sums: Mapping[int, _LayerSums], names: Sequence[str]) -> None:
    """Add the keys where names end, as texts of one length run together."""
    encoded = [model.encode(text) for text in names]
    wide = {n: layer for n, layer in sums.items() if len(layer.second_moment)}
    if not wide:
        return
    with torch.no_grad(), model.tap_layers({n: layer.add_ends for n, layer in wide.items()}):
        for places in group_by_length(encoded):
            ids = torch.tensor([encoded[n] for n in places], device=model.device)
            model.run_to_layer(ids, max(wide))


def pack_statistics(statistics: Mapping[int, LayerStatistics]) -> bytes:
    """Write statistics as safetensors bytes.

    A covariance is stored as its Cholesky factor, each column in 8 bits with its own scale: half
    the size of float16, and still positive semidefinite after rounding.
    """
    tensors: dict[str, Tensor] = {}
    for n, layer in statistics.items():
        tensors[f"{n}/mean"] = layer.output_mean
        tensors[f"{n}/norm"] = torch.tensor([layer.median_norm])
        if not layer.has_covariance:
            continue
        if len(layer.sink_key):
            tensors[f"{n}/sink"] = layer.sink_key
        factor = _cholesky_factor(layer.covariance)
        scale = factor.abs().amax(0) / 127  # (width,)
        rows, columns = torch.tril_indices(*factor.shape)
        tensors[f"{n}/factor"] = (factor / scale)[rows, columns].round().to(torch.int8)
        tensors[f"{n}/scale"] = scale.float()
    return save(tensors)


def _cholesky_factor(covariance: Tensor) -> Tensor:
    """Compute L with L Lᵀ = C0 in float64, lifted when too little text left it singular.

    Raises KeditError for a matrix that is not finite or all zeros.
    """
    c0 = covariance.double()
    factor: Tensor
    for lift in CHOLESKY_LIFTS:
        factor, info = torch.linalg.cholesky_ex(
            c0 + lift * c0.diagonal().mean() * torch.eye(len(c0))
        )
        if int(info) == 0 and torch.isfinite(factor).all():
            return factor
    raise KeditError("the keys' covariance has no Cholesky factor", code="statistics")


def unpack_statistics(data: bytes) -> dict[int, LayerStatistics]:
    """Read statistics that `pack_statistics` wrote. Raises KeditError for an older form."""
    tensors = load(data)
    if any(name.endswith("/covariance") for name in tensors):
        raise KeditError(
            "the statistics are in an older form",
            code="statistics",
            hint="remove statistics.kedit from the model's folder: it is measured again",
        )
    result = {}
    for n in sorted({int(name.split("/")[0]) for name in tensors}):
        covariance: Tensor | PackedCovariance = torch.empty(0, 0)
        if (scale := tensors.get(f"{n}/scale")) is not None:
            covariance = PackedCovariance(tensors[f"{n}/factor"], scale)
        mean, norm = tensors[f"{n}/mean"], float(tensors[f"{n}/norm"])
        sink = tensors.get(f"{n}/sink", torch.empty(0))
        result[n] = LayerStatistics(covariance, mean, norm, sink)
    return result
