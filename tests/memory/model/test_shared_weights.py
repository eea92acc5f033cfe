"""Weights stay in their file, which processes share, except for those that are edited."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import SENTENCES, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from memory.model.canary import Canary
from memory.model.canary_file import load_readings, pack_readings
from memory.model.checkpoint import Checkpoint
from memory.model.editable import EditableModel
from memory.model.prefix_cache import PrefixCache

CPU = torch.device("cpu")
STATEMENTS = [" ".join(line.split()[:4]) for line in SENTENCES[:30]]


def save_in_bfloat16(kind: str, folder: Path, source: Path) -> Path:
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture
def low(model_folder: Callable[[str], Path], tmp_path: Path) -> EditableModel:
    """A tiny Llama that is stored and runs in bfloat16."""
    folder = save_in_bfloat16("llama", tmp_path / "low", model_folder("llama"))
    return EditableModel.load(folder, CPU, torch.bfloat16)


@pytest.fixture
def wide(low: EditableModel, tmp_path: Path) -> EditableModel:
    """The same checkpoint, run in float32."""
    return EditableModel.load(tmp_path / "low", CPU)


class Mapping:
    """The place of a checkpoint in this process's memory."""

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "model.safetensors")

    def spans(self) -> list[range]:
        lines = Path("/proc/self/maps").read_text().splitlines()
        found = [re.match(r"(\w+)-(\w+) ", line) for line in lines if line.endswith(self.path)]
        return [range(int(m[1], 16), int(m[2], 16)) for m in found if m]

    def holds(self, tensor: torch.Tensor) -> bool:
        return any(tensor.data_ptr() in span for span in self.spans())

    def dirty_kilobytes(self) -> int:
        text = Path("/proc/self/smaps").read_text()
        parts = re.split(r"(?m)^(?=\w+-\w+ \S{4} )", text)
        mine = [part for part in parts if part.split("\n", 1)[0].endswith(self.path)]
        return sum(int(n) for part in mine for n in re.findall(r"Private_Dirty: +(\d+)", part))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_only_edited_layers_leave_the_file(kind: str, tmp_path: Path) -> None:
    folder = save_model(kind, tmp_path / kind)
    with (folder / "model.safetensors").open() as file:
        os.fsync(file.fileno())  # pages that the disk does not have yet count as dirty too
    model, mapping = EditableModel.load(folder, CPU), Mapping(folder)
    assert all(mapping.holds(p) for p in model.hf_model.parameters())
    model.set_deltas({1: torch.ones_like(model.base_weight(1))})
    own = {id(model._down_projections[1].weight)}
    outside = {id(p) for p in model.hf_model.parameters() if not mapping.holds(p)}
    assert outside == own
    assert mapping.holds(model._base_weights[1])
    with model.at_base():
        model.hf_model(input_ids=torch.tensor([model.encode(SENTENCES[0])]))
    assert mapping.dirty_kilobytes() == 0


def test_a_checkpoint_of_bfloat16_has_one_hash_in_both_dtypes(
    low: EditableModel, wide: EditableModel, tmp_path: Path
) -> None:
    layers = range(low.layer_count)
    assert low.dtype is torch.bfloat16 and wide.dtype is torch.float32
    assert low.weights_hash(layers) == wide.weights_hash(layers)
    delta = 1e-5 * torch.randn(*wide.base_weight(1).shape)  # far below a step of bfloat16
    before = low.weights_hash(layers)
    for model in (low, wide):
        model.set_deltas({1: delta})
    edited = low.weights_hash(layers)
    assert edited == wide.weights_hash(layers) != before
    assert edited == Checkpoint(tmp_path / "low").weights_hash(layers, {1: delta})
    with low.at_base():
        assert low.weights_hash(layers) == before
    assert low.weights_hash(layers) == edited
    low.set_deltas({})
    assert low.weights_hash(layers) == before


def test_edited_layers_alone_run_in_float32(low: EditableModel) -> None:
    low.keep_base([2])
    dtypes = {n: low.weight(n).dtype for n in range(low.layer_count)}
    assert dtypes == {0: torch.bfloat16, 1: torch.bfloat16, 2: torch.float32, 3: torch.bfloat16}
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(layer: int) -> Callable[[torch.Tensor, torch.Tensor], None]:
        return lambda inputs, outputs: seen.update({layer: (inputs, outputs)})

    ids = torch.tensor([low.encode(SENTENCES[0])])
    with torch.no_grad(), low.tap_layers({n: keep(n) for n in (1, 2)}):
        low.hf_model(input_ids=ids)
    for inputs, outputs in seen.values():
        assert inputs.dtype is outputs.dtype is torch.float32
    inputs, outputs = seen[2]
    assert torch.equal(outputs, inputs @ low.weight(2).T)  # nothing of it is rounded


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama", "phi"])
def test_a_change_in_a_16_bit_model_acts_like_in_float32(
    kind: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = save_in_bfloat16(kind, tmp_path / "low", model_folder(kind))
    low, wide = EditableModel.load(folder, CPU, torch.bfloat16), EditableModel.load(folder, CPU)
    ids, moved = torch.tensor([low.encode(SENTENCES[5])]), []
    for model in (low, wide):
        model.widen_layers([1])
        with torch.no_grad():
            before = model.hf_model(input_ids=ids).logits[0, -1].float()
            model.set_deltas({1: model.base_weight(1).clone()})
            moved.append(model.hf_model(input_ids=ids).logits[0, -1].float() - before)
    assert torch.cosine_similarity(*moved, dim=0) > 0.98


def test_the_canary_of_a_16_bit_model_starts_from_its_own_base(
    low: EditableModel, tmp_path: Path
) -> None:
    low.widen_layers([1])
    canary = Canary(low, SENTENCES[:6], [1], STATEMENTS)
    (tmp_path / "kept").write_bytes(pack_readings(canary.base_readings))
    again = Canary(low, SENTENCES[:6], [1], STATEMENTS, load_readings(tmp_path / "kept", CPU))
    for one in (canary, again):
        health = one.measure_health()
        assert (health.kl, health.agreement, health.perplexity_ratio) == (0.0, 1.0, 1.0)
        assert health.norm_ratio == {"1": 1.0}
    low.set_deltas({1: low.base_weight(1) * 0.3})
    assert again.measure_health() == canary.measure_health()
    assert canary.measure_health().kl > 0


def test_kept_prefixes_of_a_16_bit_model_give_its_own_logits(low: EditableModel) -> None:
    low.widen_layers([2])
    row = low.encode(SENTENCES[3])
    cache = PrefixCache(low, 2, 1, len(row) - 3, 3)
    cache.fill_rows(0, [row[:-3]], [row[-3:]])
    with torch.no_grad():
        found = cache.logits(torch.tensor([[0, 1, 2]]))[0]
        whole = low.hf_model(input_ids=torch.tensor([row])).logits[0, -3:]
    assert torch.allclose(found.float(), whole.float(), atol=0.1)
