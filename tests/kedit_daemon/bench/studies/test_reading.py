import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from kedit_daemon.bench.studies.reading import Reader
from kedit_daemon.editing.model_loading import Loaded
from kedit_daemon.shipped import read_statements

Load = Callable[[str], Loaded]


def test_the_text_is_read_as_the_canary_reads_it(load: Load) -> None:
    loaded = load("llama")
    read, baseline = Reader(loaded.model).read(None), loaded.canary.baseline
    assert read.perplexity == pytest.approx(baseline.perplexity, rel=1e-5)
    for layer, norm in baseline.norms.items():
        assert read.written[layer] == pytest.approx(norm, rel=1e-5)
    assert len(read.written) == len(read.ends) == len(read.stream) + 1 == loaded.model.layers
    assert read.finite


def test_statements_are_read_at_their_ends_in_their_order(load: Load) -> None:
    model = load("llama").model
    read = Reader(model).read(None)
    for place in (0, 7, 250):
        ids = torch.tensor([model.encode(read_statements()[place])])
        with torch.no_grad():
            out = model.model(input_ids=ids, output_hidden_states=True)
        for block, ends in enumerate(read.ends):
            assert torch.allclose(ends[place], out.hidden_states[block + 1][0, -1], atol=1e-4)


def test_a_change_is_seen_in_the_weights_and_over_them(load: Load) -> None:
    model = load("llama").model
    reader = Reader(model)
    base = reader.read(None)
    doubled = model.base_weight(1).clone()

    @contextmanager
    def over(_places: list[int]) -> Iterator[None]:
        with model.tap({1: lambda inputs, outputs: outputs + inputs @ doubled.T}):
            yield

    laid = reader.read(over)
    model.set_deltas({1: doubled})
    edited = reader.read(None)
    assert edited.written[0] == pytest.approx(base.written[0])
    assert edited.written[1] == pytest.approx(2 * base.written[1])
    assert edited.stream[1] != pytest.approx(base.stream[1])
    assert laid.written == pytest.approx(edited.written, rel=1e-4)
    assert laid.stream == pytest.approx(edited.stream, rel=1e-4)
    assert laid.perplexity == pytest.approx(edited.perplexity, rel=1e-4)
    assert torch.allclose(laid.ends[-1], edited.ends[-1], atol=1e-3)


def test_numbers_that_break_are_told(load: Load) -> None:
    model = load("llama").model
    model.set_deltas({2: torch.full_like(model.base_weight(2), math.nan)})
    assert not Reader(model).read(None).finite
