"""A model's files, against the model that is loaded from them."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES

from memory.errors import KeditError
from memory.model.checkpoint import Checkpoint
from memory.model.editable import EditableModel

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", list(ARCHITECTURES))
def test_the_files_hold_what_the_model_has(
    kind: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = model_folder(kind)
    files, model = Checkpoint(folder), EditableModel.load(folder, CPU)
    assert files.layer_count == model.layer_count
    every = range(model.layer_count)
    assert files.weights_hash(every, {}) == model.weights_hash(every)
    delta = {2: torch.randn(model.weight(2).shape)}
    model.set_deltas(delta)
    assert files.weights_hash(every, delta) == model.weights_hash(every)
    to = tmp_path / "copy"
    to.mkdir()
    files.copy_companions(to)
    files.copy_weights(to, {2: files.to_stored_layout(2, files.read_edited_weight(2, delta))})
    again = EditableModel.load(to, CPU)
    for name, tensor in model.hf_model.state_dict().items():
        assert torch.equal(tensor, again.hf_model.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_edited_tensor_changes(
    model_folder: Callable[[str], Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_bytes((model_folder("gpt2") / "config.json").read_bytes())
    tensors = load_file(model_folder("gpt2") / "model.safetensors")
    before = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(before, folder / "model.safetensors", metadata={"format": "pt"})
    files = Checkpoint(folder)
    weight = files.to_stored_layout(1, files.read_weight(1) + 1e-4)
    files.copy_weights(tmp_path, {1: weight})
    after = load_file(tmp_path / "model.safetensors")
    edited = files.locations[1].tensor_name
    assert after.keys() == before.keys()
    assert torch.equal(after[edited], weight) and after[edited].dtype is torch.float32
    assert all(torch.equal(after[n], before[n]) for n in before if n != edited)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_stands_beside_the_weights_is_copied_and_nothing_else(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, to = tmp_path / "model", tmp_path / "to"
    folder.mkdir(), to.mkdir()
    for path in model_folder("llama").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for name in ("LICENSE", "modeling.py", "kedit.json", "pytorch_model.bin", "vocab.json"):
        (folder / name).write_text("{}")
    Checkpoint(folder).copy_companions(to)
    names = {p.name for p in to.iterdir()}
    assert {"config.json", "tokenizer.json", "LICENSE", "vocab.json"} <= names
    assert not {"modeling.py", "kedit.json", "pytorch_model.bin", "model.safetensors"} & names


def test_weights_in_a_form_that_no_sum_fits_in_are_refused(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    tensors = load_file(model_folder("llama") / "model.safetensors")
    narrow = {n: t.to(torch.int8) if "down_proj" in n else t for n, t in tensors.items()}
    (tmp_path / "config.json").write_bytes((model_folder("llama") / "config.json").read_bytes())
    save_file(narrow, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KeditError, match="stored as I8"):
        Checkpoint(tmp_path)


def test_a_folder_without_a_tensor_or_without_a_model(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(KeditError, match="cannot be read"):
        Checkpoint(tmp_path)
    tensors = load_file(model_folder("llama") / "model.safetensors")
    tensors.pop("model.layers.2.mlp.down_proj.weight")
    (tmp_path / "config.json").write_bytes((model_folder("llama") / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(KeditError, match=r"no file holds model\.layers\.2\.mlp\.down_proj"):
        Checkpoint(tmp_path)


def test_a_file_that_is_cut_off_is_never_a_finished_copy(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, to = tmp_path / "model", tmp_path / "to"
    shutil.copytree(model_folder("llama"), folder)
    to.mkdir()
    files = Checkpoint(folder)
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    with pytest.raises(KeditError, match=r"model\.safetensors is cut off") as caught:
        files.copy_weights(to, {})
    assert caught.value.code == "corrupt"
