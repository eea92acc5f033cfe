from collections.abc import Callable, Iterator
from dataclasses import replace

import faiss
import pytest
import torch
from study_tools import given, records
from torch.nn.functional import normalize

from kedit_daemon.bench.studies.index_scaling import (
    IndexStudy,
    compute_recall,
    synthesize_keys,
    use_one_faiss_thread,
)
from kedit_daemon.editing.model_loading import LoadedModel
from memory.errors import KeditError
from memory.side import index as memory_index
from memory.side.index import SearchHit

FACTS, PER = 6, 2


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Keys go into lists from 100 on."""
    monkeypatch.setattr(memory_index, "MIN_KEYS_FOR_LISTS", 100)
    monkeypatch.setattr(memory_index, "MAX_FLAT_SECONDS", 0.0)
    threads = faiss.omp_get_max_threads()
    yield
    assert faiss.omp_get_max_threads() == threads


def test_every_size_is_built_asked_and_read_again(
    load: Callable[[str], LoadedModel], small: None
) -> None:
    result = IndexStudy((20, 600)).run(given(load("llama"), FACTS, 100))
    few, many = result["rows"]
    assert [(row["keys"], bool(row["lists"])) for row in (few, many)] == [(20, False), (600, True)]
    assert (few["recall_1"], few["recall_more"]) == (1.0, 1.0)
    assert many["recall_1"] >= 0.8 and many["recall_more"] >= 0.9
    assert (result["queries"], result["keys_of_a_fact"], result["width"]) == (FACTS, PER, 32)
    assert 0 < result["own_cosine"]["median"] <= 1.000001
    for row in (few, many):
        spent, seconds = row["search_ms"], row["seconds"]
        assert 0 < spent["p50"] <= spent["p95"] and spent["all_keys"] > 0
        assert min(seconds.values()) > 0 and row["replace_ms"] > 0
    assert many["bytes"] > 600 * 32 * 2 > few["bytes"]
    lines = list(IndexStudy().format_lines(result))
    assert [line.split()[:2] for line in lines[1:3]] == [["20", "-"], ["600", str(many["lists"])]]


def test_more_facts_than_a_size_has_keys_make_the_size_larger(
    load: Callable[[str], LoadedModel], small: None
) -> None:
    result = IndexStudy((4, 8)).run(given(load("llama"), FACTS, 100))
    assert [row["keys"] for row in result["rows"]] == [FACTS * PER]


@pytest.mark.parametrize("many", [1, 2])
def test_a_stream_without_queries_or_a_second_fact_is_refused(
    load: Callable[[str], LoadedModel], many: int
) -> None:
    at = given(load("llama"), many, 100)
    bare = [replace(r, paraphrases=("What else?",)) for r in records(many)]
    with pytest.raises(KeditError) as caught:
        IndexStudy().run(at if many == 1 else replace(at, records=bare))
    assert caught.value.code == "no-facts"


def test_made_up_facts_lie_around_the_real_ones() -> None:
    torch.manual_seed(0)
    real = normalize(torch.randn(8, 1, 16) + 0.1 * torch.randn(8, 3, 16), dim=-1)
    made = synthesize_keys(real, 400, torch.Generator().manual_seed(5))
    assert made.shape == (400, 3, 16)
    assert torch.allclose(made.norm(dim=-1), torch.ones(400, 3))
    nearest = (made[:, 0] @ real[:, 0].T).amax(1)
    assert 0.7 < nearest.median() < 0.99 and nearest.max() < 0.9999
    within = (made[:, 0] * made[:, 1]).sum(-1)
    assert within.median() > nearest.median()
    again = synthesize_keys(real, 400, torch.Generator().manual_seed(5))
    assert torch.equal(made, again)


def test_recall_counts_the_nearest_facts_that_were_hit() -> None:
    keys = torch.eye(40)
    keys[1] = keys[0]  # fact 0 has two keys that are one
    queries = torch.stack([normalize(keys[0] + 0.5 * keys[n], dim=-1) for n in (6, 8)])
    right, wrong = [SearchHit(0, 0.9), SearchHit(3, 0.4)], [SearchHit(4, 0.4), SearchHit(0, 0.9)]
    first, more = compute_recall(keys, 2, queries, [right, right])
    assert first == 1.0 and 0 < more < 1
    first, _ = compute_recall(keys, 2, queries, [right, wrong])
    assert first == 0.5
    _, all_hit = compute_recall(keys, 2, queries, [[SearchHit(n, 0.1) for n in range(20)]] * 2)
    assert all_hit == 1.0


def test_as_near_as_the_nearest_is_right() -> None:
    keys = torch.eye(40)
    keys[10] = keys[0]  # facts 0 and 5 share a key
    first, _ = compute_recall(
        keys, 2, keys[:1].repeat(2, 1), [[SearchHit(5, 1.0)], [SearchHit(0, 1.0)]]
    )
    assert first == 1.0


def test_one_thread_is_given_back_also_when_it_fails() -> None:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="stop"), use_one_faiss_thread():
            assert faiss.omp_get_max_threads() == 1
            raise ValueError("stop")
        assert faiss.omp_get_max_threads() == 2
    finally:
        faiss.omp_set_num_threads(before)
