"""The fingerprint tells models and machines apart that measure differently."""

from collections.abc import Callable
from pathlib import Path

import torch

from memory.model.editable import EditableModel
from memory.model.fingerprint import compute_fingerprint


def test_the_same_model_has_the_same_fingerprint_edited_or_not(
    model: EditableModel, model_folder: Callable[[str], Path]
) -> None:
    mark = compute_fingerprint(model)
    assert compute_fingerprint(EditableModel.load(model_folder("llama"), model.device)) == mark
    model.set_deltas({1: model.base_weight(1) * 0.1})
    assert compute_fingerprint(model) == mark


def test_a_weight_that_no_edit_changes_counts(model: EditableModel) -> None:
    """As where attention alone was finetuned: the hash of the down projections is the same."""
    mark, weights = compute_fingerprint(model), model.weights_hash(range(model.layer_count))
    with torch.no_grad():
        model.hf_model.model.layers[0].self_attn.q_proj.weight[0, 0] += 0.01
    assert model.weights_hash(range(model.layer_count)) == weights
    assert compute_fingerprint(model) != mark


def test_the_number_of_threads_counts(model: EditableModel) -> None:
    mark, threads = compute_fingerprint(model), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert compute_fingerprint(model) != mark
    finally:
        torch.set_num_threads(threads)
