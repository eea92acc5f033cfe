import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch

from kedit_daemon.bench.studies.activation_reader import ActivationReader
from kedit_daemon.editing.model_loading import CanaryTexts, LoadedModel, read_canary_texts
from kedit_daemon.shipped import read_statements

Load = Callable[[str], LoadedModel]
TEXTS = CanaryTexts(read_canary_texts().lines[:6], read_canary_texts().statements[:24])


def test_the_text_is_read_as_the_canary_reads_it(load: Load) -> None:
    loaded = load("llama")
    read = ActivationReader(loaded.model, TEXTS).read_activations(None)
    baseline = loaded.canary.base_readings
    assert read.perplexity == pytest.approx(baseline.perplexity, rel=1e-5)
    for layer, norm in baseline.activation_norms.items():
        assert read.mlp_norms[layer] == pytest.approx(norm, rel=1e-5)
    assert (
        len(read.mlp_norms)
        == len(read.statement_ends)
        == len(read.stream_norms) + 1
        == loaded.model.layer_count
    )
    assert read.is_finite


def test_statements_are_read_at_their_ends_in_their_order(load: Load) -> None:
    model = load("llama").model
    read = ActivationReader(model, TEXTS).read_activations(None)
    for place in (0, 7, 23):
        ids = torch.tensor([model.encode(read_statements()[place])])
        with torch.no_grad():
            out = model.hf_model(input_ids=ids, output_hidden_states=True)
        for block, ends in enumerate(read.statement_ends):
            assert torch.allclose(ends[place], out.hidden_states[block + 1][0, -1], atol=1e-4)


def test_a_change_is_seen_in_the_weights_and_over_them(load: Load) -> None:
    model = load("llama").model
    reader = ActivationReader(model, TEXTS)
    base = reader.read_activations(None)
    doubled = model.base_weight(1).clone()

    @contextmanager
    def over(_places: list[int]) -> Iterator[None]:
        with model.tap_layers({1: lambda inputs, outputs: outputs + inputs @ doubled.T}):
            yield

    laid = reader.read_activations(over)
    model.set_deltas({1: doubled})
    edited = reader.read_activations(None)
    assert edited.mlp_norms[0] == pytest.approx(base.mlp_norms[0])
    assert edited.mlp_norms[1] == pytest.approx(2 * base.mlp_norms[1])
    assert edited.stream_norms[1] != pytest.approx(base.stream_norms[1])
    assert laid.mlp_norms == pytest.approx(edited.mlp_norms, rel=1e-4)
    assert laid.stream_norms == pytest.approx(edited.stream_norms, rel=1e-4)
    assert laid.perplexity == pytest.approx(edited.perplexity, rel=1e-4)
    assert torch.allclose(laid.statement_ends[-1], edited.statement_ends[-1], atol=1e-3)


def test_numbers_that_break_are_told(load: Load) -> None:
    model = load("llama").model
    model.set_deltas({2: torch.full_like(model.base_weight(2), math.nan)})
    assert not ActivationReader(model, TEXTS).read_activations(None).is_finite
