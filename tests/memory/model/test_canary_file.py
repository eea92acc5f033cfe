"""Readings of a canary are the same after they were kept in a file."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import SENTENCES

from memory.model.canary import Canary, CanaryReadings
from memory.model.canary_file import load_readings, pack_readings
from memory.model.editable import EditableModel

LINES, STATEMENTS = SENTENCES[:6], [" ".join(line.split()[:4]) for line in SENTENCES[:30]]


def kept(readings: CanaryReadings, path: Path) -> CanaryReadings:
    path.write_bytes(pack_readings(readings))
    return load_readings(path, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_kept_readings_give_the_same_figures_bit_for_bit(
    kind: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = EditableModel.load(model_folder(kind), torch.device("cpu"))
    canary = Canary(model, LINES, [1], STATEMENTS)
    again = kept(canary.base_readings, tmp_path / "kept")
    assert again == canary.base_readings
    for one, other in zip(again.end_activations, canary.base_readings.end_activations, strict=True):
        assert torch.equal(one, other)
    other_canary = Canary(model, LINES, [1], STATEMENTS, again)
    assert other_canary.measure_health() == canary.measure_health()
    assert canary.measure_health().kl == 0.0
    model.set_deltas({1: model.base_weight(1) * 0.2})
    assert other_canary.measure_health() == canary.measure_health()
    assert canary.measure_health().kl > 0


def test_readings_without_statements_and_of_odd_numbers_are_kept(
    model: EditableModel, tmp_path: Path
) -> None:
    readings = replace(Canary(model, LINES, [1]).base_readings, perplexity=math.inf)
    again = kept(readings, tmp_path / "kept")
    assert again == readings
    assert [len(rows) for rows in again.end_activations] == [0] * model.layer_count
