"""Vectors in lists around centres (FAISS's IVF), of which a search compares only the nearest.

FAISS and what it links take 100 MB of memory, so only a process with that many keys imports this.
"""

import math
from typing import Any

import torch  # before faiss, always: the two bring different CUDA runtimes (see the test)

import faiss  # isort: skip
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from memory.errors import KeditError
from memory.side.flat_vectors import FlatVectors, Ids, Vectors

Packed = NDArray[np.uint8]

TEMPORARY_GPU_BYTES = 64 << 20

# 1,000,000 keys of width 192 (those of 8000 CounterFact facts on the shipped model, the rest drawn
# around them), 500 paraphrases as queries, one thread of a busy machine, p50 of a search for 16:
# flat 74 ms; 2048 lists take 27 s to build, and with 8, 16, 32, 64 probed a search takes 0.13,
# 0.22, 0.40, 0.74 ms, recall@1 is .992, .992, .996, .996 and recall@16 .995, .996, .999, .999;
# 4096 lists take 73 s, and 0.28 ms at 32 with the same recall. Misses at 32 are other keys of the
# same fact, which differ by less than float16 resolves. `bench --study index` measures it again.
LISTS_PER_ROOT = 2.0  # times the square root of the number of keys
LISTS_PROBED = 32
KMEANS_PASSES = 5  # more do not improve the lists
SAMPLED_KEYS_PER_LIST = 32


class ListedVectors:
    """Unit vectors (n, width) in float16 under ids of their own."""

    def __init__(self, index: Any, *, gpu: bool = False) -> None:
        """`index` is FAISS's."""
        self.index, self.width = index, int(index.d)
        self._gpu_index: Any = None
        # get_num_gpus, not hasattr: the GPU classes exist in the wheel on every machine.
        has_gpu = gpu and faiss.get_num_gpus() > 0
        self._gpu_resources = faiss.StandardGpuResources() if has_gpu else None
        if self._gpu_resources is not None:
            self._gpu_resources.setTempMemory(TEMPORARY_GPU_BYTES)

    @classmethod
    def build(cls, ids: Ids, vectors: Vectors, *, gpu: bool = False) -> "ListedVectors":
        """Find centres for vectors (n, width), and put these into the lists."""
        width, lists = vectors.shape[1], choose_list_count(len(ids))
        kind, metric = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        # float16 of the keys themselves, not of their residuals to a centre (the last argument): a
        # rebuild of the lists leaves them unchanged.
        index: Any = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(width), width, lists, kind, metric, False
        )
        index.nprobe, index.cp.niter = LISTS_PROBED, KMEANS_PASSES
        index.cp.min_points_per_centroid = 1
        index.set_direct_map_type(index.direct_map.Hashtable)  # else a removal scans all keys
        count = min(len(ids), SAMPLED_KEYS_PER_LIST * lists)
        sample = np.linspace(0, len(ids) - 1, count).astype(np.int64)
        index.train(vectors[sample])
        index.add_with_ids(vectors, ids)
        return cls(index, gpu=gpu)

    def __len__(self) -> int:
        return int(self.index.ntotal)

    @property
    def list_count(self) -> int:
        """Count of lists."""
        return int(self.index.nlist)

    def add(self, ids: Ids, vectors: Vectors) -> None:
        """Add vectors (n, width) under new ids (n,)."""
        self.index.add_with_ids(vectors, ids)
        self._gpu_index = None

    def remove(self, ids: Ids) -> None:
        """Remove vectors by their ids."""
        self.index.remove_ids(faiss.IDSelectorArray(ids))
        self._gpu_index = None

    def reconstruct(self, ids: Ids) -> Vectors:
        """Return the vectors (n, width) of some ids."""
        vectors: Vectors = self.index.reconstruct_batch(ids)
        return vectors

    def read_all(self) -> tuple[Ids, Vectors]:
        """Return all ids (n,) and vectors (n, width)."""
        lists, ids, codes = self.index.invlists, [], []
        for n in range(self.list_count):
            if not (size := lists.list_size(n)):
                continue  # an empty list has no array
            ids.append(faiss.rev_swig_ptr(lists.get_ids(n), size))
            codes.append(faiss.rev_swig_ptr(lists.get_codes(n), size * lists.code_size))
        halves = np.concatenate(codes).view(np.float16).reshape(-1, self.width)
        return np.concatenate(ids), halves.astype(np.float32)

    def search(self, queries: Vectors, count: int) -> tuple[Vectors, Ids]:
        """Return cosines and ids (rows, count) of vectors near to queries (rows, width), best
        first; id -1 for none."""
        scores, ids = self._get_searcher().search(queries, count)
        return scores, ids

    def _get_searcher(self) -> Any:
        if self._gpu_resources is None:
            return self.index
        if self._gpu_index is None:
            self._gpu_index = faiss.index_cpu_to_gpu(self._gpu_resources, 0, self.index)
        return self._gpu_index

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the index in FAISS's own form as the tensor of a file."""
        return {"index": torch.from_numpy(faiss.serialize_index(self.index))}


def choose_list_count(keys: int) -> int:
    """Choose the number of lists for a number of keys."""
    return max(1, round(LISTS_PER_ROOT * math.sqrt(keys)))


def unpack_vectors(data: Packed, *, gpu: bool = False) -> ListedVectors | FlatVectors:
    """Read what `ListedVectors.to_tensors` has packed, or a flat index of an older version.

    Raises KeditError (code "corrupt").
    """
    try:
        index: Any = faiss.deserialize_index(data)
    except RuntimeError as error:
        raise KeditError(f"FAISS cannot read the index: {error}", code="corrupt") from error
    if isinstance(index, faiss.IndexIVF):
        return ListedVectors(index, gpu=gpu)
    flat = FlatVectors(index.d, gpu=gpu)
    flat.add(faiss.vector_to_array(index.id_map), index.index.reconstruct_n(0, index.ntotal))
    return flat
