"""Which facts are near a key: a FAISS index with ids, kept on the CPU, cloned to a GPU if any.

While it is small, every key is compared with a query. Once that has become slow the keys are put
into lists around centres (IVF), and only the lists nearest to a query are looked through.
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

MAX_FLAT_SECONDS = 0.5e-3  # a flat search of one query that is slower makes the keys go into lists
MIN_KEYS_FOR_LISTS = 10_000  # fewer are never put into lists
RETIMING_GROWTH = 1.1  # a flat search is timed again when there are so many times more keys
TIMING_TRIES = 5  # of them the quickest counts: what else the machine does must not decide

# 1,000,000 keys of width 192 (those of 8000 CounterFact facts on the shipped model, the rest drawn
# around them), 500 paraphrases as queries, one thread of a busy machine, p50 of a search for 16:
# flat 74 ms; 2048 lists take 27 s to make, and PROBES 8, 16, 32, 64 give 0.13, 0.22, 0.40, 0.74 ms
# with recall@1 of .992, .992, .996, .996 and recall@16 of .995, .996, .999, .999; 4096 lists take
# 73 s, and at 32 give 0.28 ms with the same recall. What is missed at 32 are keys of the very fact
# that was to be found: they differ by less than float16 tells. `bench --study index` asks again.
LISTS_PER_ROOT = 2.0  # times the root of the number of keys
LISTS_PROBED = 32
KMEANS_PASSES = 5  # of k-means over the sample; more make the lists no better
SAMPLED_KEYS_PER_LIST = 32  # keys for each list

ORDINAL_BITS = 15  # of an id of a vector: which of its number's keys it is

Ids = NDArray[np.int64]
Vectors = NDArray[np.float32]


@dataclass(frozen=True)
class SearchHit:
    """A fact whose key is near: the fact's number and the cosine."""

    fact_number: int
    score: float


class KeyIndex:
    """Unit vectors under fact numbers below 2**48; several vectors may share one number."""

    def __init__(self, width: int, *, gpu: bool = False) -> None:
        self.width = width
        self._cpu_index: Any = self._make_flat_index()
        self._gpu_index: Any = None
        self._fingerprints: dict[
            int, tuple[int, int]
        ] = {}  # of each number how many keys, and their mark
        self._changed_numbers = set[int]()  # numbers put or taken out since the file was written
        self._next_timing_at = MIN_KEYS_FOR_LISTS
        # get_num_gpus, not hasattr: the GPU classes exist in the wheel on every machine.
        self._gpu_resources = (
            faiss.StandardGpuResources() if gpu and faiss.get_num_gpus() > 0 else None
        )
        if self._gpu_resources is not None:
            self._gpu_resources.setTempMemory(TEMPORARY_GPU_BYTES)

    def __len__(self) -> int:
        return int(self._cpu_index.ntotal)

    def fact_numbers(self) -> Sequence[int]:
        """The numbers that are held."""
        return list(self._fingerprints)

    @property
    def list_count(self) -> int:
        """How many lists the keys are in; 0 while every key is compared."""
        return int(self._cpu_index.nlist) if self._has_lists else 0

    @property
    def changed_share(self) -> float:
        """How many numbers have changed since the file was written, over how many are held."""
        return len(self._changed_numbers) / max(len(self._fingerprints), 1)

    def find_non_finite(self) -> list[int]:
        """The numbers that have a key which is not finite."""
        if not len(self):
            return []
        ids, vectors = self._read_all_vectors()
        bad = ids[~np.isfinite(vectors).all(axis=1)]
        return sorted(set((bad >> ORDINAL_BITS).tolist()))

    # Change -------------------------------------------------------------------------------------

    def add(self, number: int, keys: Tensor) -> None:
        """Put keys (n, width) under a number, in the place of older ones. Raises KeditError on a
        key that is not finite."""
        self._put_vectors({number: _to_finite_vectors(keys)})

    def remove(self, number: int) -> int:
        """Take out all keys of a number; how many there were."""
        count, _ = self._fingerprints.get(number, (0, 0))
        self._remove_numbers([number] if number in self._fingerprints else [])
        return count

    def sync_keys(self, wanted: Mapping[int, Tensor]) -> None:
        """Hold just these numbers with just these keys (n, width): what is so already is left
        alone. Raises KeditError on a key that is not finite."""
        vectors = {number: _to_finite_vectors(keys) for number, keys in wanted.items()}
        self._remove_numbers([n for n in self._fingerprints if n not in vectors])
        self._put_vectors(
            {n: v for n, v in vectors.items() if self._fingerprints.get(n) != _fingerprint_keys(v)}
        )

    def _put_vectors(self, keys: Mapping[int, Vectors]) -> None:
        self._remove_numbers([n for n in keys if n in self._fingerprints])
        if not keys:
            return
        ids = _make_vector_ids(keys, map(len, keys.values()))
        self._cpu_index.add_with_ids(np.concatenate(list(keys.values())), ids)
        self._fingerprints |= {
            number: _fingerprint_keys(vectors) for number, vectors in keys.items()
        }
        self._changed_numbers |= keys.keys()
        self._gpu_index = None
        self._rebuild_if_slow()

    def _remove_numbers(self, numbers: Sequence[int]) -> None:
        if not numbers:
            return
        counts = [self._fingerprints.pop(number)[0] for number in numbers]
        ids = _make_vector_ids(numbers, counts)
        # Lists know where an id is; without them all ids are gone through, and asked for in a set.
        chosen = faiss.IDSelectorArray(ids) if self._has_lists else faiss.IDSelectorBatch(ids)
        self._cpu_index.remove_ids(chosen)
        if not self._fingerprints:
            self._cpu_index, self._next_timing_at = (
                self._make_flat_index(),
                MIN_KEYS_FOR_LISTS,
            )  # other keys want other lists
        self._changed_numbers.update(numbers)
        self._gpu_index = None

    # Form ---------------------------------------------------------------------------------------

    @property
    def _has_lists(self) -> bool:
        return isinstance(self._cpu_index, faiss.IndexIVF)

    def _make_flat_index(self) -> Any:
        return faiss.IndexIDMap2(faiss.IndexFlatIP(self.width))

    def _rebuild_if_slow(self) -> None:
        """Make lists when a flat search has become slow, and others when there are four times as
        many keys as when they were made."""
        many = len(self)
        if self._has_lists:
            if _choose_list_count(many) >= 2 * self.list_count:
                self._make_lists()
        elif many >= self._next_timing_at:
            self._next_timing_at = int(RETIMING_GROWTH * many)
            if self._time_flat_search() > MAX_FLAT_SECONDS:
                self._make_lists()

    def _time_flat_search(self) -> float:
        searcher, query = self._get_searcher(), np.zeros((1, self.width), dtype=np.float32)
        spent = []
        for _ in range(TIMING_TRIES):
            began = time.perf_counter()
            searcher.search(query, 1)
            spent.append(time.perf_counter() - began)
        return min(spent)

    def _make_lists(self) -> None:
        ids, vectors = self._read_all_vectors()
        lists = _choose_list_count(len(ids))
        kind, metric = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
        # float16 of the keys themselves, not of what is left of them beside a centre (the last
        # argument): made into other lists they stay what they are.
        made: Any = faiss.IndexIVFScalarQuantizer(
            faiss.IndexFlatIP(self.width), self.width, lists, kind, metric, False
        )
        made.nprobe, made.cp.niter, made.cp.min_points_per_centroid = LISTS_PROBED, KMEANS_PASSES, 1
        made.set_direct_map_type(made.direct_map.Hashtable)  # else a removal goes through all
        sample = np.linspace(0, len(ids) - 1, min(len(ids), SAMPLED_KEYS_PER_LIST * lists)).astype(
            np.int64
        )
        made.train(vectors[sample])
        made.add_with_ids(vectors, ids)
        self._cpu_index, self._gpu_index = made, None

    def _read_all_vectors(self) -> tuple[Ids, Vectors]:
        """Every vector (n, width), with its id."""
        if not self._has_lists:
            vectors = self._cpu_index.index.reconstruct_n(0, len(self))
            return faiss.vector_to_array(self._cpu_index.id_map), vectors
        lists, ids, codes = self._cpu_index.invlists, [], []
        for n in (
            n for n in range(self.list_count) if lists.list_size(n)
        ):  # an empty one has no array of a type
            size = lists.list_size(n)
            ids.append(faiss.rev_swig_ptr(lists.get_ids(n), size))
            codes.append(faiss.rev_swig_ptr(lists.get_codes(n), size * lists.code_size))
        halves = np.concatenate(codes).view(np.float16).reshape(-1, self.width)
        return np.concatenate(ids), halves.astype(np.float32)

    # Search -------------------------------------------------------------------------------------

    def search(self, keys: Tensor, count: int) -> list[list[SearchHit]]:
        """The nearest `count` vectors of each query (n, width), best first."""
        if not len(self):
            return [[] for _ in keys]
        scores, ids = self._search_nearest(keys, count)
        return [
            [
                SearchHit(int(n) >> ORDINAL_BITS, float(s))
                for n, s in zip(row_n, row_s, strict=True)
                if n >= 0
            ]
            for row_n, row_s in zip(ids, scores, strict=True)
        ]

    def find_near(self, keys: Tensor, count: int, least: float) -> list[int]:
        """The numbers among the nearest `count` vectors of the queries (n, width) whose cosine with
        one is at least so much, each once."""
        if not len(self):
            return []
        scores, ids = self._search_nearest(keys, count)
        enough = (scores.astype(np.float64) >= least) & (ids >= 0)
        return list(dict.fromkeys((ids[enough] >> ORDINAL_BITS).tolist()))

    def filter_near(self, numbers: Sequence[int], keys: Tensor, least: float) -> list[int]:
        """Those of the numbers that have a vector whose cosine with one of keys (n, width) is at
        least so much. Nothing is searched: only the vectors of these numbers are looked at."""
        held = [number for number in numbers if number in self._fingerprints]
        if not held:
            return []
        ids = _make_vector_ids(held, [self._fingerprints[number][0] for number in held])
        vectors = self._cpu_index.reconstruct_batch(ids)
        nearest = (vectors @ _to_vectors(keys).T).max(axis=1)
        return list(dict.fromkeys((ids[nearest >= least] >> ORDINAL_BITS).tolist()))

    def _search_nearest(self, keys: Tensor, count: int) -> tuple[Vectors, Ids]:
        """Cosines and ids (n, count) of the nearest vectors, best first; id -1 where there are no
        more."""
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
        """Write the CPU form as `<sha256>.safetensors` into the folder; returns the sha256."""
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
        """From the file that `save` wrote. Raises KeditError: missing, damaged, or not for this
        version of FAISS."""
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


def _fingerprint_keys(vectors: Vectors) -> tuple[int, int]:
    """How many keys, and a mark of what they say: by it a file tells whether it has the keys that
    the store has, also where it keeps them in float16."""
    digest = hashlib.blake2b(vectors.tobytes(), digest_size=8).digest()
    return len(vectors), int.from_bytes(digest, "little", signed=True)


def _make_vector_ids(numbers: Iterable[int], counts: Iterable[int]) -> Ids:
    """The ids of all vectors of some numbers, each with as many vectors as told."""
    known = zip(numbers, counts, strict=True)
    return np.concatenate([(number << ORDINAL_BITS) + np.arange(count) for number, count in known])
