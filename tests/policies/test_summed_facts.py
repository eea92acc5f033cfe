from collections.abc import Mapping, Sequence

import pytest
import torch

from policies.edit_terms import EditTerms, pack_terms, unpack_terms
from policies.solver import stack_facts
from policies.summed_facts import Grid, LayerSums, LayerTerms, SummedFacts

WIDTH, HIDDEN, LAYER = 24, 8, 3
GRID = Grid.measure(1.0, 1.0)


def blob(seed: int, size: float = 1.0) -> bytes:
    draw = torch.Generator().manual_seed(seed)
    keys = size * torch.randn(2, 1, WIDTH, generator=draw)
    residuals = size * torch.randn(1, HIDDEN, generator=draw)
    return pack_terms(EditTerms({LAYER: keys}, {LAYER: residuals}, 0.1, 7, {}))


def name(*seeds: int) -> dict[str, bytes]:
    return {f"{seed:012x}": blob(seed) for seed in seeds}


def read_rows(blobs: Sequence[bytes]) -> dict[int, LayerTerms]:
    unpacked = map(unpack_terms, blobs)
    pairs = [(keys[LAYER], residuals[LAYER]) for keys, residuals in unpacked]
    rounded = [(GRID.round_keys(k), GRID.round_residuals(r)) for k, r in pairs]
    return {LAYER: stack_facts(rounded)}


@pytest.fixture
def summed() -> SummedFacts:
    return SummedFacts(lambda: {LAYER: LayerSums(WIDTH, HIDDEN, GRID)}, read_rows)


def ask(summed: SummedFacts, terms: Mapping[str, bytes], **gone: bytes) -> LayerSums:
    return summed.sum_over(terms, lambda n: gone.get(n))[LAYER]


def fresh(terms: Mapping[str, bytes]) -> LayerSums:
    made = SummedFacts(lambda: {LAYER: LayerSums(WIDTH, HIDDEN, GRID)}, read_rows)
    return ask(made, terms)


def is_same(one: LayerSums, other: LayerSums) -> bool:
    return torch.equal(one.gram, other.gram) and torch.equal(one.cross, other.cross)


def test_they_are_the_sums_of_products(summed: SummedFacts) -> None:
    terms = name(*range(30))
    pairs = [(k[LAYER], r[LAYER]) for k, r in map(unpack_terms, terms.values())]
    keys, residuals = (part.double() for part in stack_facts(pairs))
    found = ask(summed, terms)
    torch.testing.assert_close(found.gram, keys.T @ keys, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.cross, keys.T @ residuals, rtol=1e-4, atol=1e-3)


def test_facts_that_joined_and_left_leave_no_trace(summed: SummedFacts) -> None:
    every = name(*range(400))
    ids = sorted(every)
    for chosen in (ids[:300], ids, ids[50:], ids[50:390], ids[:390], ids[:300]):
        terms = {n: every[n] for n in chosen}
        assert is_same(ask(summed, terms, **every), fresh(terms))


def test_a_change_reads_the_terms_of_what_changed_alone(summed: SummedFacts) -> None:
    every = name(*range(40))
    ask(summed, every)
    read = list[int]()

    def count(blobs: Sequence[bytes]) -> dict[int, LayerTerms]:
        read.append(len(blobs))
        return read_rows(blobs)

    summed._read_rows = count
    ask(summed, dict(list(every.items())[2:]) | name(77), **every)
    assert read == [2, 1]


def test_a_fact_whose_terms_are_lost_leaves_no_trace_either(summed: SummedFacts) -> None:
    ask(summed, name(*range(40)))
    assert is_same(ask(summed, name(*range(39))), fresh(name(*range(39))))


def test_a_fact_with_new_terms_has_these(summed: SummedFacts) -> None:
    first = name(*range(40))
    changed = first | {min(first): blob(1000)}
    ask(summed, first)
    assert is_same(ask(summed, changed, **changed), fresh(changed))


def test_numbers_too_large_to_be_summed_exactly_are_summed_in_one_order(
    summed: SummedFacts,
) -> None:
    huge = {f"{seed:012x}": blob(seed, 1e5) for seed in range(1000, 1040)}
    every = name(*range(400)) | huge
    ask(summed, name(*range(400)))
    assert not ask(summed, every).is_exact
    assert is_same(ask(summed, every), fresh(every))
    assert is_same(ask(summed, name(*range(400)), **every), fresh(name(*range(400))))


def test_numbers_that_are_not_finite_leave_with_their_fact(summed: SummedFacts) -> None:
    terms = name(*range(40))
    broken = terms | {"f" * 12: blob(5, float("nan"))}
    assert not torch.isfinite(ask(summed, broken).gram).all()
    assert is_same(ask(summed, terms, **broken), fresh(terms))
