"""What ordinary text does inside the model: key covariance, means, norms, layer by layer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from safetensors.torch import load, save
from torch import Tensor

from memory.errors import KeditError
from memory.model.editable import EditableModel

MAX_TOKENS = 256
ROWS_AT_ONCE = 16  # rows whose keys go into one product
PACKED = 2  # the form that `pack` writes; another form is another number
LIFTS = (1e-5, 1e-4, 1e-3, 1e-2)  # of the mean of C0's diagonal, below any ridge
FIRST = 1  # positions before it are left out: the first token acts as an attention sink


@dataclass(frozen=True)
class LayerStatistics:
    """Over the tokens of ordinary text at one down projection.

    covariance: C0 = E[k kᵀ] (width, width) float32, not centred, as in MEMIT (Meng et al. 2023);
    empty (0, 0) for a layer that is only read. mean: E[y] (hidden,) of the output. norm: the
    median ‖y‖, since a few tokens are attention sinks with enormous activations.
    """

    covariance: Tensor
    mean: Tensor
    norm: float


class _Sums:
    """What is added up for one layer."""

    def __init__(self, width: int, hidden: int) -> None:
        self.moment = torch.zeros(width, width, dtype=torch.float64)
        self.total = torch.zeros(hidden, dtype=torch.float64)
        self.norms: list[Tensor] = []
        self._keys: list[Tensor] = []

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        values = outputs[0, FIRST:].double().cpu()  # (tokens, hidden)
        self.total += values.sum(0)
        self.norms.append(values.norm(dim=1))
        if len(self.moment):
            self._keys.append(inputs[0, FIRST:])
            if len(self._keys) == ROWS_AT_ONCE:
                self.fold()

    def fold(self) -> None:
        """float32 within a product, float64 over them."""
        if self._keys:
            keys = torch.cat(self._keys)  # (tokens, width)
            self.moment += (keys.T @ keys).cpu()
            self._keys.clear()

    def result(self, count: int) -> LayerStatistics:
        self.fold()
        norm = float(torch.cat(self.norms).median())
        return LayerStatistics((self.moment / count).float(), (self.total / count).float(), norm)


def collect(
    model: EditableModel,
    lines: Sequence[str],
    edited: Iterable[int],
    read: Iterable[int] = (),
    progress: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> dict[int, LayerStatistics]:
    """Measure layers over the lines, run together into rows of MAX_TOKENS.

    The layers of `edited` get a covariance, those of `read` do without. Raises KeditError when
    there is too little text for one row.
    """
    wide = set(edited)
    sums = {
        n: _Sums(model.weight(n).shape[1] if n in wide else 0, model.hidden)
        for n in sorted({*wide, *read})
    }

    def watch(layer: int, inputs: Tensor, outputs: Tensor) -> None:
        sums[layer].add(inputs, outputs)

    count, row = 0, list[int]()
    with torch.no_grad(), model.tap({n: partial(watch, n) for n in sums}):
        for line in progress(lines):
            row += model.encode(line)
            if len(row) < MAX_TOKENS:
                continue
            count += MAX_TOKENS - FIRST
            ids = torch.tensor([row[:MAX_TOKENS]], device=model.device)
            model.model(input_ids=ids, use_cache=False)
            row = []
    if not count:
        raise KeditError(f"less than {MAX_TOKENS} tokens of text to measure", code="statistics")
    return {n: layer.result(count) for n, layer in sums.items()}


def pack(statistics: Mapping[int, LayerStatistics]) -> bytes:
    """Statistics as safetensors bytes.

    A covariance is kept as its Cholesky factor, each column in 8 bits with a scale of its own, half
    of what float16 takes; and what comes back is positive semidefinite, whatever the rounding.
    """
    tensors: dict[str, Tensor] = {}
    for n, layer in statistics.items():
        tensors[f"{n}/mean"] = layer.mean
        tensors[f"{n}/norm"] = torch.tensor([layer.norm])
        if not len(layer.covariance):
            continue
        factor = _factor(layer.covariance)
        scale = factor.abs().amax(0) / 127  # (width,)
        rows, columns = torch.tril_indices(*factor.shape)
        tensors[f"{n}/factor"] = (factor / scale)[rows, columns].round().to(torch.int8)
        tensors[f"{n}/scale"] = scale.float()
    return save(tensors)


def _factor(covariance: Tensor) -> Tensor:
    """L with L Lᵀ = C0, lifted where too little text left it singular. float64.

    Raises KeditError for what is no covariance: not finite, or nothing but zeros.
    """
    c0 = covariance.double()
    factor: Tensor
    for lift in LIFTS:
        factor, info = torch.linalg.cholesky_ex(
            c0 + lift * c0.diagonal().mean() * torch.eye(len(c0))
        )
        if int(info) == 0 and torch.isfinite(factor).all():
            return factor
    raise KeditError("the keys' covariance has no Cholesky factor", code="statistics")


def unpack(data: bytes) -> dict[int, LayerStatistics]:
    """Statistics as packed. Raises KeditError for another form."""
    tensors = load(data)
    if any(name.endswith("/covariance") for name in tensors):
        raise KeditError(
            "the statistics are in an older form",
            code="statistics",
            hint="remove statistics.kedit from the model's folder: it is measured again",
        )
    result = {}
    for n in sorted({int(name.split("/")[0]) for name in tensors}):
        covariance = torch.empty(0, 0)
        if (scale := tensors.get(f"{n}/scale")) is not None:
            factor = torch.zeros(len(scale), len(scale))
            rows, columns = torch.tril_indices(*factor.shape)
            factor[rows, columns] = tensors[f"{n}/factor"].float()
            factor *= scale
            covariance = factor @ factor.T
        result[n] = LayerStatistics(covariance, tensors[f"{n}/mean"], float(tensors[f"{n}/norm"]))
    return result
