"""Vectors with ids in one array, which a search compares whole."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]

GROWTH = 1.25  # of the array when it is full


class FlatVectors:
    """Vectors (n, width) under ids of their own, in no order."""

    list_count = 0  # nothing is sorted into lists

    def __init__(self, width: int, *, gpu: bool = False) -> None:
        self.width, self._on_gpu = width, gpu and torch.cuda.is_available()
        self._ids: Ids = np.empty(0, dtype=np.int64)  # with room for more, as _vectors
        self._vectors: Vectors = np.empty((0, width), dtype=np.float32)
        self._places: dict[int, int] = {}  # by id
        self._gpu_copy: Tensor | None = None

    def __len__(self) -> int:
        return len(self._places)

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """Add vectors (n, width) under new ids (n,)."""
        first, count = len(self), len(self) + len(ids)
        if count > len(self._ids):
            more = max(count, int(GROWTH * len(self._ids))) - len(self._ids)
            self._ids = np.concatenate([self._ids, np.empty(more, dtype=np.int64)])
            room = np.empty((more, self.width), dtype=np.float32)
            self._vectors = np.concatenate([self._vectors, room])
        self._ids[first:count], self._vectors[first:count] = ids, vectors
        self._places.update(zip(ids.tolist(), range(first, count), strict=True))
        self._gpu_copy = None

    def remove(self, ids: Ids) -> None:
        """Remove vectors by their ids. The last ones move into the gaps."""
        for gone in ids.tolist():
            place = self._places.pop(gone)
            if (last := len(self)) != place:
                moved = int(self._ids[last])
                self._ids[place], self._vectors[place] = moved, self._vectors[last]
                self._places[moved] = place
        self._gpu_copy = None

    def reconstruct(self, ids: Ids) -> Vectors:
        """Return the vectors (n, width) of some ids."""
        return self._vectors[[self._places[n] for n in ids.tolist()]]

    def read_all(self) -> tuple[Ids, Vectors]:
        """Return all ids (n,) and vectors (n, width), not copied."""
        return self._ids[: len(self)], self._vectors[: len(self)]

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the ids (n,) and vectors (n, width) as the tensors of a file."""
        ids, vectors = self.read_all()
        return {"ids": torch.from_numpy(ids), "vectors": torch.from_numpy(vectors)}

    def search(self, queries: Vectors, count: int) -> tuple[Vectors, Ids]:
        """Return cosines and ids (rows, count) of the vectors nearest to queries (rows, width),
        best first."""
        base = self._read_base()
        best = (torch.from_numpy(queries).to(base.device) @ base.T).topk(count)
        return best.values.cpu().numpy(), self._ids[best.indices.cpu().numpy()]

    def _read_base(self) -> Tensor:
        if not self._on_gpu:
            return torch.from_numpy(self._vectors[: len(self)])
        if self._gpu_copy is None:
            self._gpu_copy = torch.from_numpy(self._vectors[: len(self)]).cuda()
        return self._gpu_copy
