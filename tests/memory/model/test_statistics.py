from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from tiny_models import SENTENCES
from torch import Tensor

from memory.errors import KeditError
from memory.model.editable import EditableModel
from memory.model.statistics import (
    FIRST_POSITION,
    NAMES_WEIGHT,
    ROW_TOKENS,
    LayerStatistics,
    _LayerSums,
    collect_statistics,
    pack_statistics,
    unpack_statistics,
)

LINES = SENTENCES[:90]


def rows(model: EditableModel) -> list[list[int]]:
    """The rows that the lines fill: cut at MAX_TOKENS, an unfilled last one left out."""
    found, row = [], []
    for line in LINES:
        row = row + model.encode(line)
        if len(row) >= ROW_TOKENS:
            found.append(row[:ROW_TOKENS])
            row = []
    return found


def direct(model: EditableModel, layer: int) -> tuple[Tensor, Tensor]:
    """Inputs (tokens, width) and outputs (tokens, hidden), all positions but the first."""
    keys, values = [], []
    with torch.no_grad():
        for row in rows(model):
            caught: list[tuple[Tensor, Tensor]] = []
            with model.tap_layers({layer: lambda k, y, to=caught: to.append((k[0], y[0]))}):
                model.hf_model(input_ids=torch.tensor([row]), use_cache=False)
            keys.append(caught[0][0][FIRST_POSITION:])
            values.append(caught[0][1][FIRST_POSITION:])
    return torch.cat(keys).double(), torch.cat(values).double()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_they_are_what_a_direct_computation_gives(
    kind: str, model_folder: Callable[[str], Path]
) -> None:
    model = EditableModel.load(model_folder(kind), torch.device("cpu"))
    measured = collect_statistics(model, LINES, [1, 3])
    assert len(rows(model)) > 1
    assert list(measured) == [1, 3]
    for layer, found in measured.items():
        keys, values = direct(model, layer)
        covariance = (keys.T @ keys / len(keys)).float()
        assert torch.allclose(found.covariance, covariance, rtol=1e-4, atol=1e-7)
        assert torch.allclose(found.output_mean, values.mean(0).float(), rtol=1e-4, atol=1e-6)
        assert found.median_norm == pytest.approx(float(values.norm(dim=1).median()), rel=1e-5)
        assert found.covariance.dtype is found.output_mean.dtype is torch.float32


def test_names_count_in_the_covariance_and_in_nothing_else(model: EditableModel) -> None:
    names = ["It is Oslo", "The seat of country 7", "Rome"]
    plain, found = (collect_statistics(model, LINES, [2], names=n)[2] for n in ((), names))
    ends = list[Tensor]()
    with torch.no_grad(), model.tap_layers({2: lambda k, _y: ends.append(k[0, -1])}):
        for name in names:
            model.hf_model(input_ids=torch.tensor([model.encode(name)]), use_cache=False)
    keys = torch.stack(ends)
    wanted = plain.covariance + NAMES_WEIGHT * keys.T @ keys / len(names)
    wanted /= 1 + NAMES_WEIGHT
    assert torch.allclose(found.covariance, wanted, rtol=1e-4, atol=1e-6)
    assert torch.equal(found.output_mean, plain.output_mean)
    assert (found.median_norm, len(found.sink_key)) == (plain.median_norm, len(plain.sink_key))


def test_the_covariance_is_symmetric_and_has_no_negative_direction(model: EditableModel) -> None:
    covariance = collect_statistics(model, LINES, [2])[2].covariance.double()
    assert torch.allclose(covariance, covariance.T, atol=1e-7)
    values = torch.linalg.eigvalsh(covariance)
    assert float(values.min()) > -1e-6 * float(values.max())


def test_measuring_again_gives_the_same_bits_and_leaves_the_model_alone(
    model: EditableModel,
) -> None:
    layers = range(model.layer_count)
    before = model.weights_hash(layers)
    first, second = collect_statistics(model, LINES, [0]), collect_statistics(model, LINES, [0])
    assert torch.equal(first[0].covariance, second[0].covariance)
    assert first[0].median_norm == second[0].median_norm
    assert model.weights_hash(layers) == before


def test_a_layer_that_is_only_read_goes_without_a_covariance(model: EditableModel) -> None:
    full, found = (
        collect_statistics(model, LINES, range(3)),
        collect_statistics(model, LINES, [1], [0, 1, 2]),
    )
    assert list(found) == [0, 1, 2]
    assert [len(found[n].covariance) for n in found] == [0, model.weight(1).shape[1], 0]
    assert torch.equal(found[1].covariance, full[1].covariance)
    for n in found:
        assert torch.equal(found[n].output_mean, full[n].output_mean)
        assert found[n].median_norm == full[n].median_norm


def test_too_little_text_is_refused(model: EditableModel) -> None:
    with pytest.raises(KeditError) as caught:
        collect_statistics(model, LINES[:2], [2])
    assert caught.value.code == "statistics"


def test_every_line_is_told_to_the_progress(model: EditableModel) -> None:
    seen: list[str] = []

    def progress(lines: Iterable[str]) -> Iterable[str]:
        for line in lines:
            seen.append(line)
            yield line

    found = collect_statistics(model, LINES, [2], progress=progress)[2]
    assert isinstance(found, LayerStatistics)
    assert seen == LINES


def returned(covariance: Tensor) -> Tensor:
    """A covariance, packed and unpacked."""
    return unpack_statistics(
        pack_statistics({0: LayerStatistics(covariance, torch.zeros(4), 1.0)})
    )[0].covariance


def covariance_of(keys: Tensor) -> Tensor:
    return keys.T @ keys / len(keys)


def off(covariance: Tensor) -> float:
    """The largest error of what comes back, in units of the mean of the diagonal."""
    back = returned(covariance).double() - covariance.double()
    return float(back.abs().max() / covariance.double().diagonal().mean())


def test_what_is_packed_comes_back_layer_by_layer() -> None:
    torch.manual_seed(0)
    given = {
        12: LayerStatistics(covariance_of(torch.randn(50, 12)), torch.randn(6), 3.25),
        5: LayerStatistics(torch.zeros(0, 0), torch.randn(6), 0.5),
        2: LayerStatistics(covariance_of(torch.randn(50, 8)), torch.randn(6), 1.5),
    }
    found = unpack_statistics(pack_statistics(given))
    assert list(found) == [2, 5, 12]
    for n, layer in given.items():
        assert torch.equal(found[n].output_mean, layer.output_mean)
        assert found[n].median_norm == layer.median_norm
        assert found[n].covariance.shape == layer.covariance.shape
        assert torch.allclose(found[n].covariance, layer.covariance, atol=0.02)
        assert found[n].covariance.dtype is found[n].output_mean.dtype is torch.float32


@pytest.mark.parametrize("unit", [1e-3, 1.0, 1e3])
def test_a_covariance_comes_back_to_a_hundredth(unit: float) -> None:
    """One scale for the whole factor would be off by more than that."""
    keys = torch.randn(512, 128, generator=torch.Generator().manual_seed(0)) * unit
    assert 0 < off(covariance_of(keys)) < 0.01


def test_each_column_of_the_factor_has_a_scale_of_its_own() -> None:
    """All keys share a large part; beside it the rest, in many small columns, must not be lost.

    A step of 1/127 of a row, or of the whole factor, is longer than any entry of those columns.
    """
    width = 256
    signs = torch.randint(0, 2, (width, width), generator=torch.Generator().manual_seed(0))
    factor = torch.tril(signs * 2.0 - 1) * 0.9 / 254
    factor[:, 0] = 1.0
    assert off((factor @ factor.T).float()) < 2e-4


def test_a_measured_covariance_is_near_what_was_measured(model: EditableModel) -> None:
    for layer in collect_statistics(model, LINES, range(4)).values():
        assert off(layer.covariance) < 0.1


@pytest.mark.parametrize("tokens", [1, 3, 200])
def test_what_comes_back_has_no_negative_direction(tokens: int) -> None:
    """Also where fewer tokens than the layer is wide leave the covariance singular."""
    keys = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens))
    covariance = covariance_of(keys)
    assert torch.linalg.matrix_rank(covariance) == min(tokens, 64)
    back = returned(covariance)
    assert torch.equal(back, back.T)
    values = torch.linalg.eigvalsh(back.double())
    assert float(values.min()) > -1e-6 * float(values.max())
    assert off(covariance) < 0.05


def test_a_covariance_that_rounding_left_indefinite_is_lifted_as_far_as_it_needs() -> None:
    covariance = torch.eye(32)
    covariance[0, 0] = -1e-3
    back = returned(covariance)
    assert float(torch.linalg.eigvalsh(back.double()).min()) > -1e-6
    assert off(covariance) < 0.05


def test_a_covariance_takes_half_a_byte_an_entry() -> None:
    width = 512
    keys = torch.randn(width, width, generator=torch.Generator().manual_seed(0))
    size = len(pack_statistics({3: LayerStatistics(covariance_of(keys), torch.zeros(8), 1.0)}))
    assert width**2 / 2 < size < 0.52 * width**2


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_what_is_no_covariance_is_refused(value: float) -> None:
    with pytest.raises(KeditError) as caught:
        returned(torch.full((4, 4), value))
    assert caught.value.code == "statistics"


def test_an_older_form_is_told_from_this_one() -> None:
    with pytest.raises(KeditError) as caught:
        unpack_statistics(save({"1/covariance": torch.zeros(3), "1/mean": torch.zeros(2)}))
    assert (caught.value.code, bool(caught.value.hint)) == ("statistics", True)


def test_the_key_of_a_sink_is_kept_where_first_tokens_agree(model: EditableModel) -> None:
    keys: list[torch.Tensor] = []
    with torch.no_grad(), model.tap_layers({1: lambda k, _y: keys.append(k[0, 0])}):
        model.hf_model(torch.tensor([model.encode("Rome lies in Italy")]))
    measured = collect_statistics(model, SENTENCES, (1,), (2,))
    # Each text of this tokenizer begins with the same token.
    assert torch.allclose(measured[1].sink_key, keys[0], atol=1e-4)
    assert not len(measured[2].sink_key)  # a layer that is only read holds nothing back
    again = unpack_statistics(pack_statistics(measured))
    assert torch.equal(again[1].sink_key, measured[1].sink_key)


def test_first_tokens_that_differ_are_no_sink() -> None:
    sums = _LayerSums(4, 2)
    for n in range(4):  # one text each
        keys = torch.zeros(1, 3, 4)
        keys[0, 0, n] = 1.0
        sums.add_row(keys, torch.ones(1, 3, 2))
    assert not len(sums.to_statistics(8, 0).sink_key)
