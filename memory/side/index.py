"""Nearest-neighbour index of the facts' keys: FAISS, kept on the CPU, cloned to a GPU if any.

A small index is flat: every key is compared with a query. When that becomes slow, the keys are put
into lists around centres (IVF), and only the lists nearest to a query are searched.
"""

import hashlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch  # before faiss, always: the two bring different CUDA runtimes (see the test)

import faiss  # isort: skip
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from memory.errors import KeditError, NotFinite
from memory.files import load_tensors, save_tensors

TEMPORARY_GPU_BYTES = 64 << 20

MAX_FLAT_SECONDS = 0.5e-3  # of a flat search for one query; when it is slower, lists are built
MIN_KEYS_FOR_LISTS = 10_000
RETIMING_GROWTH = 1.1  # a flat search is timed again when the keys have grown by this factor
TIMING_TRIES = 5  # of which the quickest counts: other load on the machine must not decide

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

ORDINAL_BITS = 15  # of a vector's id: its ordinal among the keys of its fact number

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class SearchHit:
    """A fact with a near key: the fact's number and the cosine."""

    fact_number: int
    score: float


class KeyIndex:
    """Unit vectors under fact numbers below 2**48; several vectors may share one number."""

    def __init__(self, width: int, *, gpu: bool = False) -> None:
        self.width = width
        self._cpu_index: Any = self._make_flat_index()
        self._gpu_index: Any = None
        self._fingerprints: dict[int, tuple[int, int]] = {}  # by number: count and hash of keys
        self._changed_numbers = set[int]()  # added or removed since the file was written
        self._next_timing_at = MIN_KEYS_FOR_LISTS
        # get_num_gpus, not hasattr: the GPU classes exist in the wheel on every machine.
        self._gpu_resources = (
            faiss.StandardGpuResources() if gpu and faiss.get_num_gpus() > 0 else None
        )
        if self._gpu_resources is not None:
            self._gpu_resources.setTempMemory(TEMPORARY_GPU_BYTES)

    def __len__(self) -> int:
        return int(self._cpu_index.ntotal)

    @property
    def list_count(self) -> int:
        """Count of lists; 0 for a flat index."""
        return int(self._cpu_index.nlist) if self._has_lists else 0

    @property
    def changed_share(self) -> float:
        """Share of the numbers that changed since the file was written."""
        return len(self._changed_numbers) / max(len(self._fingerprints), 1)

    def find_non_finite(self) -> list[int]:
        """Return the numbers that have a key which is not finite."""
        if not len(self):
            return []
        ids, vectors = self._read_all_vectors()
        bad = ids[~np.isfinite(vectors).all(axis=1)]
        return sorted(set((bad >> ORDINAL_BITS).tolist()))

    # Change -------------------------------------------------------------------------------------

    def add(self, number: int, keys: Tensor) -> None:
        """Set the keys (n, width) of a number. Raises NotFinite."""
        self._put_vectors({number: _to_finite_vectors(keys)})

    def remove(self, number: int) -> int:
        """Remove all keys of a number, and return how many there were."""
        count, _ = self._fingerprints.get(number, (0, 0))
        self._remove_numbers([number] if number in self._fingerprints else [])
        return count

    def sync_keys(self, wanted: Mapping[int, Tensor]) -> None:
        """Make the index hold exactly these keys (n, width) by number; only differences are
        changed. Raises NotFinite."""
        vectors = {number: _to_finite_vectors(keys) for number, keys in wanted.items()}
        self._remove_numbers([n for n in self._fingerprints if n not in vectors])
        known = self._fingerprints
        self._put_vectors({n: v for n, v in vectors.items() if known.get(n) != _fingerprint(v)})

    def _put_vectors(self, keys: Mapping[int, Vectors]) -> None:
        self._remove_numbers([n for n in keys if n in self._fingerprints])
        if not keys:
            return
        ids = _make_vector_ids(keys, map(len, keys.values()))
        self._cpu_index.add_with_ids(np.concatenate(list(keys.values())), ids)
        self._fingerprints |= {number: _fingerprint(vectors) for number, vectors in keys.items()}
        self._changed_numbers |= keys.keys()
        self._gpu_index = None
        self._rebuild_if_slow()

    def _remove_numbers(self, numbers: Sequence[int]) -> None:
        if not numbers:
            return
        counts = [self._fingerprints.pop(number)[0] for number in numbers]
        ids = _make_vector_ids(numbers, counts)
        # Lists map an id to its place; a flat index scans all ids, and looks them up in a set.
        chosen = faiss.IDSelectorArray(ids) if self._has_lists else faiss.IDSelectorBatch(ids)
        self._cpu_index.remove_ids(chosen)
        if not self._fingerprints:
            self._cpu_index = self._make_flat_index()  # other keys need other lists
            self._next_timing_at = MIN_KEYS_FOR_LISTS
        self._changed_numbers.update(numbers)
        self._gpu_index = None

    # Form ---------------------------------------------------------------------------------------

    @property
    def _has_lists(self) -> bool:
        return isinstance(self._cpu_index, faiss.IndexIVF)

    def _make_flat_index(self) -> Any:
        return faiss.IndexIDMap2(faiss.IndexFlatIP(self.width))

    def _rebuild_if_slow(self) -> None:
        """Build lists when a flat search has become slow, and again at four times the keys."""
        count = len(self)
        if self._has_lists:
            if _choose_list_count(count) >= 2 * self.list_count:
                self._build_lists()
        elif count >= self._next_timing_at:
            self._next_timing_at = int(RETIMING_GROWTH * count)
            if self._time_flat_search() > MAX_FLAT_SECONDS:
                self._build_lists()

    def _time_flat_search(self) -> float:
        searcher, query = self._get_searcher(), np.zeros((1, self.width), dtype=np.float32)
        spent = []
        for _ in range(TIMING_TRIES):
            began = time.perf_counter()
            searcher.search(query, 1)
            spent.append(time.perf_counter() - began)
        return min(spent)

    def _build_lists(self) -> None:
        ids, vectors = self._read_all_vectors()
        lists = _choose_list_count(len(ids))
        kind, metric = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        # float16 of the keys themselves, not of their residuals to a centre (the last argument): a
        # rebuild of the lists leaves them unchanged.
        index: Any = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(self.width), self.width, lists, kind, metric, False
        )
        index.nprobe, index.cp.niter = LISTS_PROBED, KMEANS_PASSES
        index.cp.min_points_per_centroid = 1
        index.set_direct_map_type(index.direct_map.Hashtable)  # else a removal scans all keys
        count = min(len(ids), SAMPLED_KEYS_PER_LIST * lists)
        sample = np.linspace(0, len(ids) - 1, count).astype(np.int64)
        index.train(vectors[sample])
        index.add_with_ids(vectors, ids)
        self._cpu_index, self._gpu_index = index, None

    def _read_all_vectors(self) -> tuple[Ids, Vectors]:
        """Return all ids (n,) and vectors (n, width)."""
        if not self._has_lists:
            vectors = self._cpu_index.index.reconstruct_n(0, len(self))
            return faiss.vector_to_array(self._cpu_index.id_map), vectors
        lists, ids, codes = self._cpu_index.invlists, [], []
        for n in range(self.list_count):
            if not (size := lists.list_size(n)):
                continue  # an empty list has no array
            ids.append(faiss.rev_swig_ptr(lists.get_ids(n), size))
            codes.append(faiss.rev_swig_ptr(lists.get_codes(n), size * lists.code_size))
        halves = np.concatenate(codes).view(np.float16).reshape(-1, self.width)
        return np.concatenate(ids), halves.astype(np.float32)

    # Search -------------------------------------------------------------------------------------

    def search(self, keys: Tensor, count: int) -> list[list[SearchHit]]:
        """Return the `count` nearest vectors of each query (n, width), best first."""
        if not len(self):
            return [[] for _ in keys]
        scores, ids = self._search_nearest(keys, count)
        rows = (zip(*row, strict=True) for row in zip(ids, scores, strict=True))
        return [
            [SearchHit(int(n) >> ORDINAL_BITS, float(score)) for n, score in row if n >= 0]
            for row in rows
        ]

    def find_near(self, keys: Tensor, count: int, min_cosine: float) -> list[int]:
        """Return the numbers, each once, of vectors among the `count` nearest of each query
        (n, width) with at least this cosine."""
        if not len(self):
            return []
        scores, ids = self._search_nearest(keys, count)
        enough = (scores.astype(np.float64) >= min_cosine) & (ids >= 0)
        return list(dict.fromkeys((ids[enough] >> ORDINAL_BITS).tolist()))

    def filter_near(self, numbers: Sequence[int], keys: Tensor, min_cosine: float) -> list[int]:
        """Return those of the numbers with a vector whose cosine with one of keys (n, width) is at
        least `min_cosine`. Only the vectors of these numbers are compared: nothing is searched."""
        held = [number for number in numbers if number in self._fingerprints]
        if not held:
            return []
        ids = _make_vector_ids(held, [self._fingerprints[number][0] for number in held])
        vectors = self._cpu_index.reconstruct_batch(ids)
        nearest = (vectors @ _to_vectors(keys).T).max(axis=1)
        return list(dict.fromkeys((ids[nearest >= min_cosine] >> ORDINAL_BITS).tolist()))

    def _search_nearest(self, keys: Tensor, count: int) -> tuple[Vectors, Ids]:
        """Return cosines and ids (n, count) of the nearest vectors, best first; id -1 for none."""
        scores, ids = self._get_searcher().search(_to_vectors(keys), min(count, len(self)))
        return scores, ids

    def _get_searcher(self) -> Any:
        if self._gpu_resources is None:
            return self._cpu_index
        if self._gpu_index is None:
            self._gpu_index = faiss.index_cpu_to_gpu(self._gpu_resources, 0, self._cpu_index)
        return self._gpu_index

    # File ---------------------------------------------------------------------------------------

    def save(self, folder: Path) -> str:
        """Write the CPU index as `<sha256>.safetensors` into a folder, and return the sha256."""
        held = [(number, *known) for number, known in self._fingerprints.items()]
        tensors = {
            "held": torch.tensor(held, dtype=torch.int64).reshape(-1, 3),
            "index": torch.from_numpy(faiss.serialize_index(self._cpu_index)),
        }
        sha = save_tensors(folder, tensors)
        self._changed_numbers.clear()
        return sha

    @classmethod
    def load(cls, folder: Path, sha: str, *, gpu: bool = False) -> "KeyIndex":
        """Read the file that `save` wrote. Raises KeditError (code "corrupt") when it is missing,
        damaged, or of another version of FAISS."""
        tensors = load_tensors(folder, sha)
        try:
            cpu = faiss.deserialize_index(tensors["index"].numpy())
        except RuntimeError as error:
            raise KeditError(f"FAISS cannot read the index: {error}", code="corrupt") from error
        index = cls(cpu.d, gpu=gpu)
        index._cpu_index = cpu
        index._fingerprints = {n: (count, mark) for n, count, mark in tensors["held"].tolist()}
        return index


def _choose_list_count(keys: int) -> int:
    return max(1, round(LISTS_PER_ROOT * math.sqrt(keys)))


def _to_finite_vectors(keys: Tensor) -> Vectors:
    if not torch.isfinite(keys).all():
        raise NotFinite("a retrieval key is not finite")
    return _to_vectors(keys)


def _to_vectors(keys: Tensor) -> Vectors:
    vectors: Vectors = keys.detach().float().cpu().contiguous().numpy()
    return vectors


def _fingerprint(vectors: Vectors) -> tuple[int, int]:
    """Return the count of keys and their hash: a file is compared with the store by it, also when
    it holds the keys in float16."""
    digest = hashlib.blake2b(vectors.tobytes(), digest_size=8).digest()
    return len(vectors), int.from_bytes(digest, "little", signed=True)


def _make_vector_ids(numbers: Iterable[int], counts: Iterable[int]) -> Ids:
    """Return the ids of all vectors of some numbers, from their counts of vectors."""
    known = zip(numbers, counts, strict=True)
    return np.concatenate([(number << ORDINAL_BITS) + np.arange(count) for number, count in known])
