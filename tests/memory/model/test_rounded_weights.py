from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from memory.model.editable import EditableModel
from memory.model.rounded_weights import GROUP_SIZE, round_matrix, serve_rounded


@pytest.mark.parametrize("bits", [8, 5, 4])
@pytest.mark.parametrize("inputs", [GROUP_SIZE, 3 * GROUP_SIZE, 70])
def test_a_group_becomes_few_integers_times_its_scale(bits: int, inputs: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, inputs)
    rounded, most = round_matrix(weight, bits), 2 ** (bits - 1) - 1
    assert rounded.shape == weight.shape
    for start in range(0, inputs, GROUP_SIZE):
        group, seen = weight[:, start : start + GROUP_SIZE], rounded[:, start : start + GROUP_SIZE]
        scale = group.abs().amax(1, keepdim=True) / most
        steps = seen / scale
        assert torch.allclose(steps, steps.round(), atol=1e-3) and steps.abs().max() <= most + 1e-3
        assert ((group - seen).abs() <= scale / 2 * 1.001).all()
        # The largest of a group keeps its value.
        assert torch.allclose(seen.abs().amax(1), group.abs().amax(1))


def test_zeros_stay_zeros() -> None:
    assert torch.equal(round_matrix(torch.zeros(2, 40), 4), torch.zeros(2, 40))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_all_matrices_of_the_blocks_are_rounded_and_come_back(
    kind: str, model_folder: Callable[[str], Path]
) -> None:
    model = EditableModel.load(model_folder(kind), torch.device("cpu"))
    before = {name: p.clone() for name, p in model.hf_model.named_parameters()}
    tensors = {name: p.data_ptr() for name, p in model.hf_model.named_parameters()}
    head = model.hf_model.get_output_embeddings()
    matrices = {
        f"{name}.weight": module
        for name, module in model.hf_model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    with serve_rounded(model, 4):
        for name, now in model.hf_model.named_parameters():
            if name not in matrices:
                assert torch.equal(now, before[name]), name
                continue
            turned = isinstance(matrices[name], Conv1D)
            wanted = round_matrix(before[name].T if turned else before[name], 4)
            assert torch.equal(now.T if turned else now, wanted), name
            assert not torch.equal(now, before[name])
    after = dict(model.hf_model.named_parameters())
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert {name: p.data_ptr() for name, p in after.items()} == tensors
    assert not any(p.requires_grad for p in after.values())


def test_the_weights_come_back_after_an_error(model: EditableModel) -> None:
    before = model.weights_hash(range(model.layer_count))
    with pytest.raises(RuntimeError), serve_rounded(model, 4):
        assert model.weights_hash(range(model.layer_count)) != before
        raise RuntimeError
    assert model.weights_hash(range(model.layer_count)) == before
