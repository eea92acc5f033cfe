"""Nearest-neighbour index of the facts' keys, kept on the CPU, copied to a GPU if any.

A small index is flat: every key is compared with a query. When that becomes slow, the keys are put
into lists around centres (FAISS), and only the lists nearest to a query are searched.
"""

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from memory.errors import NotFinite
from memory.files import load_tensors, save_tensors
from memory.side.flat_vectors import FlatVectors, Ids, Vectors

MAX_FLAT_SECONDS = 0.5e-3  # of a flat search for one query; when it is slower, lists are built
MIN_KEYS_FOR_LISTS = 10_000
RETIMING_GROWTH = 1.1  # a flat search is timed again when the keys have grown by this factor
TIMING_TRIES = 5  # of which the quickest counts: other load on the machine must not decide

ORDINAL_BITS = 15  # of a vector's id: its ordinal among the keys of its fact number


def to_fact_number(fact_id: str) -> int:
    """Convert a fact's id, 12 hex digits, to its number in the index."""
    return int(fact_id, 16)


def to_fact_id(number: int) -> str:
    """Convert a fact's number in the index to its id."""
    return f"{number:012x}"


class _VectorStore(Protocol):
    """Vectors under ids, flat or in lists."""

    @property
    def list_count(self) -> int: ...
    @property
    def width(self) -> int: ...
    def __len__(self) -> int: ...
    def add(self, ids: Ids, vectors: Vectors) -> None: ...
    def remove(self, ids: Ids) -> None: ...
    def reconstruct(self, ids: Ids) -> Vectors: ...
    def read_all(self) -> tuple[Ids, Vectors]: ...
    def search(self, queries: Vectors, count: int) -> tuple[Vectors, Ids]: ...
    def to_tensors(self) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class SearchHit:
    """A fact with a near key: the fact's number and the cosine."""

    fact_number: int
    score: float


class KeyIndex:
    """Unit vectors under fact numbers below 2**48; several vectors may share one number."""

    def __init__(self, width: int, *, gpu: bool = False) -> None:
        """`gpu`: search on a GPU."""
        self.width, self._gpu = width, gpu
        self._store: _VectorStore = FlatVectors(width, gpu=gpu)
        self._fingerprints: dict[int, tuple[int, int]] = {}  # by number: count and hash of keys
        self._changed_numbers = set[int]()  # added or removed since the file was written
        self._next_timing_at = MIN_KEYS_FOR_LISTS

    def __len__(self) -> int:
        return len(self._store)

    @property
    def list_count(self) -> int:
        """Count of lists; 0 for a flat index."""
        return self._store.list_count

    @property
    def changed_share(self) -> float:
        """Share of the numbers that changed since the file was written."""
        return len(self._changed_numbers) / max(len(self._fingerprints), 1)

    def find_non_finite(self) -> list[int]:
        """Return the numbers that have a key which is not finite."""
        if not len(self):
            return []
        ids, vectors = self._store.read_all()
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
        self._store.add(ids, np.concatenate(list(keys.values())))
        self._fingerprints |= {number: _fingerprint(vectors) for number, vectors in keys.items()}
        self._changed_numbers |= keys.keys()
        self._rebuild_if_slow()

    def _remove_numbers(self, numbers: Sequence[int]) -> None:
        if not numbers:
            return
        counts = [self._fingerprints.pop(number)[0] for number in numbers]
        self._store.remove(_make_vector_ids(numbers, counts))
        if not self._fingerprints:
            self._store = FlatVectors(self.width, gpu=self._gpu)  # other keys need other lists
            self._next_timing_at = MIN_KEYS_FOR_LISTS
        self._changed_numbers.update(numbers)

    # Form ---------------------------------------------------------------------------------------

    def _rebuild_if_slow(self) -> None:
        """Build lists when a flat search has become slow, and again when there are many more
        keys."""
        count = len(self)
        if self.list_count:
            from memory.side.listed_vectors import choose_list_count

            if choose_list_count(count) >= 2 * self.list_count:
                self._build_lists()
        elif count >= self._next_timing_at:
            self._next_timing_at = int(RETIMING_GROWTH * count)
            if self._time_flat_search() > MAX_FLAT_SECONDS:
                self._build_lists()

    def _time_flat_search(self) -> float:
        query = np.zeros((1, self.width), dtype=np.float32)
        spent = []
        for _ in range(TIMING_TRIES):
            began = time.perf_counter()
            self._store.search(query, 1)
            spent.append(time.perf_counter() - began)
        return min(spent)

    def _build_lists(self) -> None:
        from memory.side.listed_vectors import ListedVectors  # only where it is worth its memory

        self._store = ListedVectors.build(*self._store.read_all(), gpu=self._gpu)

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
        vectors = self._store.reconstruct(ids)
        nearest = (vectors @ _to_vectors(keys).T).max(axis=1)
        return list(dict.fromkeys((ids[nearest >= min_cosine] >> ORDINAL_BITS).tolist()))

    def _search_nearest(self, keys: Tensor, count: int) -> tuple[Vectors, Ids]:
        """Return cosines and ids (n, count) of the nearest vectors, best first; id -1 for none."""
        return self._store.search(_to_vectors(keys), min(count, len(self)))

    # File ---------------------------------------------------------------------------------------

    def save(self, folder: Path) -> str:
        """Write the index as `<sha256>.safetensors` into a folder, and return the sha256."""
        held = [(number, *known) for number, known in self._fingerprints.items()]
        fingerprints = {"held": torch.tensor(held, dtype=torch.int64).reshape(-1, 3)}
        sha = save_tensors(folder, fingerprints | self._store.to_tensors())
        self._changed_numbers.clear()
        return sha

    @classmethod
    def load(cls, folder: Path, sha: str, *, gpu: bool = False) -> "KeyIndex":
        """Read the file that `save` wrote. Raises KeditError (code "corrupt") when it is missing,
        damaged, or of another version of FAISS."""
        tensors = load_tensors(folder, sha)
        if "index" in tensors:  # in lists, or of an older version
            from memory.side.listed_vectors import unpack_vectors

            store: _VectorStore = unpack_vectors(tensors["index"].numpy(), gpu=gpu)
        else:
            store = FlatVectors(tensors["vectors"].shape[1], gpu=gpu)
            store.add(tensors["ids"].numpy(), tensors["vectors"].numpy())
        index = cls(store.width, gpu=gpu)
        index._store = store
        index._fingerprints = {n: (count, mark) for n, count, mark in tensors["held"].tolist()}
        return index


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
