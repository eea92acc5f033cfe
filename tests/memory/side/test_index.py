import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch  # before faiss

import faiss  # isort: skip
from side_tools import fact_numbers
from torch import Tensor
from torch.nn.functional import normalize

from memory.errors import KeditError
from memory.files import save_tensors, tensors_path
from memory.side import index as module
from memory.side.index import KeyIndex, SearchHit

WIDTH = 16


def unit(count: int, seed: int = 0) -> Tensor:
    return normalize(torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists from a hundred keys on: any search is slow."""
    monkeypatch.setattr(module, "MIN_KEYS_FOR_LISTS", 100)
    monkeypatch.setattr(module, "MAX_FLAT_SECONDS", 0.0)


def grouped(count: int, seed: int = 0) -> dict[int, Tensor]:
    """Two keys, near to each other, under each of some numbers; the numbers in ten groups."""
    middle, far, near = unit(10, seed), unit(count, seed + 1), unit(2 * count, seed + 2)
    first = middle.repeat(count // 10 + 1, 1)[:count] + far
    both = normalize(first[:, None] + 0.2 * near.view(count, 2, WIDTH), dim=-1)
    return {1 + n: both[n] for n in range(count)}


def said(index: KeyIndex, queries: Tensor, count: int = 1) -> list[list[int]]:
    return [[h.fact_number for h in hits] for hits in index.search(queries, count)]


def test_faiss_is_loaded_for_lists_alone_and_after_torch() -> None:
    code = (
        "import sys, torch; from memory.side.index import KeyIndex; index = KeyIndex(9);"
        "index.add(1, torch.eye(9)); assert index.search(torch.eye(9), 1);"
        "assert 'faiss' not in sys.modules; index._build_lists(); names = list(sys.modules);"
        "assert names.index('torch') < names.index('faiss')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_nearest_keys_come_first_with_their_cosine() -> None:
    index, keys = KeyIndex(WIDTH), unit(20)
    for number, key in enumerate(keys):
        index.add(number, key[None])
    query = normalize(keys[3:4] + 0.1 * unit(1, seed=1))
    (hits,) = index.search(query, 5)
    cosines = keys @ query[0]
    best = cosines.argsort(descending=True)[:5].tolist()
    assert [h.fact_number for h in hits] == best
    assert [h.score for h in hits] == pytest.approx(cosines[best].tolist(), abs=1e-6)


def test_a_number_may_have_several_keys_and_loses_them_all() -> None:
    index, keys = KeyIndex(WIDTH), unit(5)
    largest = int("f" * 12, 16)
    index.add(largest, keys[:3])
    index.add(8, keys[3:])
    assert len(index) == 5
    assert fact_numbers(index) == [8, largest]
    assert index.remove(largest) == 3
    assert index.remove(largest) == 0
    assert {h.fact_number for hits in index.search(keys, 5) for h in hits} == {8}


def test_each_query_has_its_own_row_also_with_few_keys() -> None:
    index = KeyIndex(WIDTH)
    assert index.search(unit(2), 4) == [[], []]
    index.add(5, unit(1))
    found = index.search(unit(3, seed=2), 4)
    assert [[h.fact_number for h in hits] for hits in found] == [[5], [5], [5]]


def test_near_are_the_numbers_whose_cosine_is_enough_each_once() -> None:
    index, keys = KeyIndex(8), torch.eye(8)
    assert index.find_near(keys, 2, -1.0) == []
    index.add(5, keys[:2])
    index.add(9, keys[2:4])
    between = normalize(keys[2] + 0.5 * keys[0], dim=-1)  # .89 from number 9, .45 from 5
    assert index.find_near(torch.stack([between, keys[3]]), 2, 0.5) == [9]
    assert index.find_near(torch.stack([keys[1], between]), 2, 0.4) == [5, 9]
    assert index.find_near(between[None], 1, 0.4) == [9]
    assert index.find_near(between[None], 100, 0.9) == []


@pytest.mark.parametrize("lists", [False, True])
def test_those_near_are_some_numbers_with_a_key_that_is_near_enough(lists: bool) -> None:
    index, keys = KeyIndex(8), torch.eye(8)
    for number in (5, 9, 7):
        index.add(number, keys[number - 5 : number - 3])
    if lists:
        index._build_lists()
    between = normalize(keys[4] + 0.5 * keys[0], dim=-1)  # .89 from 9, .45 from 5, 0 from 7
    assert index.filter_near([5, 7, 9], between[None], 0.4) == [5, 9]
    assert index.filter_near([9, 7, 5], torch.stack([keys[3], between]), 0.5) == [9, 7]
    assert index.filter_near([5, 7], between[None], 0.4) == [5]
    index.remove(5)
    assert index.filter_near([5, 6], between[None], -1.0) == []
    assert index.filter_near([], between[None], -1.0) == []


def spoil(index: KeyIndex, vector: int) -> None:
    """Write NaN over a number of a vector, where it lies in memory."""
    if not index.list_count:
        ids, vectors = index._store.read_all()
        vectors[ids == vector, 0] = np.nan
        return
    lists = index._store.index.invlists
    for n in (n for n in range(index.list_count) if lists.list_size(n)):
        size = lists.list_size(n)
        codes = faiss.rev_swig_ptr(lists.get_codes(n), size * lists.code_size).view(np.float16)
        for place in np.flatnonzero(faiss.rev_swig_ptr(lists.get_ids(n), size) == vector):
            codes[place * index.width] = np.nan


@pytest.mark.parametrize("lists", [False, True])
def test_the_numbers_of_keys_that_have_been_damaged_are_told(lists: bool) -> None:
    index, keys = KeyIndex(WIDTH), unit(6)
    assert index.find_non_finite() == []
    for number in (5, 9, 7):
        index.add(number, keys[number - 5 : number - 3])
    if lists:
        index._build_lists()
    assert index.find_non_finite() == []
    for number in (9, 7):
        spoil(index, (number << module.ORDINAL_BITS) + 1)
    assert index.find_non_finite() == [7, 9]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_key_that_is_not_finite_is_refused(bad: float) -> None:
    index, keys = KeyIndex(WIDTH), unit(2)
    keys[1, 3] = bad
    with pytest.raises(KeditError) as caught:
        index.add(1, keys)
    assert caught.value.code == "non-finite"
    assert len(index) == 0


def test_a_written_index_is_the_same_when_read(tmp_path: Path) -> None:
    index, keys = KeyIndex(WIDTH), unit(6)
    index.add(9, keys[:4])
    index.add(4, keys[4:])
    index.remove(9)
    index.add(2, keys[:1])
    read = KeyIndex.load(tmp_path, index.save(tmp_path))
    assert (len(read), read.width, fact_numbers(read)) == (3, WIDTH, fact_numbers(index))
    assert read.search(keys, 3) == index.search(keys, 3)
    read.add(7, unit(1, seed=5))
    assert read.search(unit(1, seed=5), 1)[0][0].fact_number == 7
    assert SearchHit(7, 1.0) not in index.search(unit(1, seed=5), 4)[0]
    assert (read.remove(4), len(read)) == (2, 2)


def test_a_flat_index_of_an_older_version_is_read(tmp_path: Path) -> None:
    index, keys = KeyIndex(WIDTH), unit(6)
    index.add(9, keys[:4])
    index.add(4, keys[4:])
    ids, vectors = index._store.read_all()
    older = faiss.IndexIDMap2(faiss.IndexFlatIP(WIDTH))
    older.add_with_ids(vectors, ids)
    packed = torch.from_numpy(faiss.serialize_index(older))
    held = [(number, *known) for number, known in index._fingerprints.items()]
    sha = save_tensors(tmp_path, {"index": packed, "held": torch.tensor(held)})
    read = KeyIndex.load(tmp_path, sha)
    assert read.search(keys, 3) == index.search(keys, 3)
    read.sync_keys({9: keys[:4], 4: keys[4:]})
    assert read.changed_share == 0


def test_a_file_that_is_no_index_is_refused(tmp_path: Path) -> None:
    index = KeyIndex(WIDTH)
    index.add(9, unit(3))
    sha = index.save(tmp_path)
    data = tensors_path(tmp_path, sha).read_bytes()
    tensors_path(tmp_path, sha).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    noise = torch.arange(100, dtype=torch.uint8)
    other = save_tensors(tmp_path, {"index": noise, "held": torch.zeros(0, 3, dtype=torch.int64)})
    for bad in (sha, other, "0" * 64):
        with pytest.raises(KeditError) as caught:
            KeyIndex.load(tmp_path, bad)
        assert caught.value.code == "corrupt"


def test_a_number_that_is_added_again_has_its_new_keys_alone() -> None:
    index, keys = KeyIndex(WIDTH), unit(5)
    index.add(1, keys[:3])
    index.add(1, keys[3:])
    assert len(index) == 2
    assert index.search(keys[:1], 1)[0][0].score < 0.99


def test_many_come_and_go_in_any_order() -> None:
    """Against a table that is searched by hand."""
    index, keys, held = KeyIndex(WIDTH), unit(600), dict[int, Tensor]()
    choice = random.Random(3)
    for turn in range(200):
        number = choice.randrange(60)
        if number in held and choice.random() < 0.5:
            assert index.remove(number) == len(held.pop(number))
        else:
            held[number] = keys[3 * turn : 3 * turn + 1 + number % 3]
            index.add(number, held[number])
    table = torch.cat(list(held.values()))
    owners = [number for number, rows in held.items() for _ in rows]
    assert len(index) == len(table)
    for hits, cosines in zip(index.search(keys, 4), keys @ table.T, strict=True):
        best = cosines.topk(4)
        assert [h.fact_number for h in hits] == [owners[n] for n in best.indices]
        assert [h.score for h in hits] == pytest.approx(best.values.tolist(), abs=1e-6)


def test_few_keys_or_a_quick_search_stay_flat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_FLAT_SECONDS", 0.0)
    index = KeyIndex(WIDTH)
    index.sync_keys(grouped(300))
    assert index.list_count == 0
    monkeypatch.setattr(module, "MIN_KEYS_FOR_LISTS", 100)
    monkeypatch.setattr(module, "MAX_FLAT_SECONDS", 60.0)
    index = KeyIndex(WIDTH)
    index.sync_keys(grouped(300))
    assert index.list_count == 0


def test_in_lists_the_nearest_are_found_as_before(at_once: None) -> None:
    keys = grouped(2000)
    index, flat = KeyIndex(WIDTH), KeyIndex(WIDTH)
    index.sync_keys(keys)
    for number in list(keys)[:40]:
        flat.add(number, keys[number])
    assert (index.list_count, flat.list_count) == (126, 0)
    queries = normalize(torch.cat(list(keys.values())) + 0.05 * unit(4000, seed=9), dim=-1)
    cosines = queries @ torch.cat(list(keys.values())).T
    best, found = cosines.max(1), index.search(queries, 16)
    right = [
        hits[0].fact_number == 1 + int(b) // 2 for hits, b in zip(found, best.indices, strict=True)
    ]
    assert sum(right) >= 0.99 * len(right)
    scores = [hits[0].score for hits, ok in zip(found, right, strict=True) if ok]
    known = [v for v, ok in zip(best.values.tolist(), right, strict=True) if ok]
    assert scores == pytest.approx(known, abs=2e-3)
    assert all(len(hits) == 16 for hits in found)


def test_numbers_come_and_go_in_lists(at_once: None) -> None:
    index, keys = KeyIndex(WIDTH), grouped(200)
    index.sync_keys(keys)
    largest, new = int("f" * 12, 16), unit(3, seed=20)
    index.add(largest, new)
    assert index.list_count and said(index, new) == [[largest]] * 3
    assert index.remove(largest) == 3
    assert index.remove(largest) == 0
    assert largest not in {n for found in said(index, new, 16) for n in found}
    index.add(7, new)
    assert len(index) == 401 and said(index, new) == [[7]] * 3
    assert said(index, keys[7], 1) != [[7], [7]]


def test_lists_are_made_again_when_there_are_four_times_as_many_keys(at_once: None) -> None:
    index, keys = KeyIndex(WIDTH), grouped(430)
    index.sync_keys({n: k for n, k in keys.items() if n <= 100})
    first = index.list_count
    for number in range(101, 380):
        index.add(number, keys[number])
    assert index.list_count == first
    for number in range(380, 431):
        index.add(number, keys[number])
    assert index.list_count == 2 * first
    found = said(index, torch.cat(list(keys.values())))
    assert sum(n == [1 + place // 2] for place, n in enumerate(found)) >= 0.99 * len(found)
    for number in keys:
        assert index.remove(number) == 2
    assert (len(index), index.list_count, index.search(unit(1), 3)) == (0, 0, [[]])
    index.add(1, keys[1])
    assert said(index, keys[1]) == [[1], [1]]


@pytest.mark.parametrize("many", [6, 200])
def test_a_file_is_brought_to_what_is_wanted(at_once: None, tmp_path: Path, many: int) -> None:
    index, keys = KeyIndex(WIDTH), grouped(many)
    index.sync_keys(keys)
    assert index.changed_share == 1
    read = KeyIndex.load(tmp_path, index.save(tmp_path))
    assert (index.changed_share, read.changed_share, read.list_count) == (0, 0, index.list_count)
    read.sync_keys(keys)
    assert read.changed_share == 0
    other = unit(2, seed=31)
    wanted = {n: k for n, k in keys.items() if n > 2} | {3: other, 999: other[:1]}
    read.sync_keys(wanted)
    assert read.changed_share == 4 / len(wanted)
    assert (set(fact_numbers(read)), len(read)) == (set(wanted), 2 * (many - 2) + 1)
    assert sorted(said(read, other[:1], 2)[0]) == [3, 999]
    assert said(read, other[1:]) == [[3]]
    assert not {1, 2} & {
        n for found in said(read, torch.cat([keys[1], keys[2]]), 16) for n in found
    }


def test_a_key_that_is_not_finite_changes_nothing(at_once: None) -> None:
    index, keys = KeyIndex(WIDTH), grouped(5)
    index.sync_keys(keys)
    with pytest.raises(KeditError):
        index.sync_keys({1: torch.full((1, WIDTH), torch.nan)})
    assert fact_numbers(index) == sorted(keys)
