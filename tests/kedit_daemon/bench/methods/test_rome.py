from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from editing_home import seat

from kedit_daemon.bench.methods.method import MethodSetup
from kedit_daemon.bench.methods.reference_memit import RIDGE_FLOOR
from kedit_daemon.bench.methods.rome import RevisedRome, Rome
from kedit_daemon.bench.scoring import check_stated
from kedit_daemon.editing.model_loading import LoadedModel

FACT, OTHER = seat(1, "Oslo"), seat(2, "Lima")


@pytest.fixture
def setup(load: Callable[[str], LoadedModel], tmp_path: Path) -> MethodSetup:
    return MethodSetup(load("llama"), tmp_path, batch_size=1, seed=0)


@pytest.mark.parametrize("method", [Rome, RevisedRome])
def test_one_layer_takes_an_update_of_rank_one(method: type[Rome], setup: MethodSetup) -> None:
    editor = method(setup)
    editor.edit([FACT])
    assert editor.edited_layers == (editor.last_layer,)
    strengths = torch.linalg.svdvals(editor.deltas[editor.last_layer])
    assert strengths[0] > 0 and strengths[1] < 1e-4 * strengths[0]


@pytest.mark.parametrize(("method", "is_averaged"), [(Rome, False), (RevisedRome, True)])
def test_the_update_is_that_of_the_paper(
    method: type[Rome], is_averaged: bool, setup: MethodSetup
) -> None:
    """ΔW = (v* − W k) uᵀ / (uᵀ k), u = C0⁻¹ k̄, by a dense inverse."""
    editor = method(setup)
    layer = editor.last_layer
    batch = editor.build_context_batch([text + FACT.question for text in editor.contexts], FACT)
    target = editor.compute_target(FACT, batch)
    assert target is not None
    keys = editor.read_keys(layer, batch).double()
    mean = (keys[0] + keys[1:].mean(0)) / 2
    c0 = setup.loaded_model.statistics[layer].covariance.double()
    floor = RIDGE_FLOOR * c0.diagonal().mean() * torch.eye(len(c0), dtype=torch.float64)
    u = torch.linalg.inv(c0 + floor) @ mean
    residual = (target - editor.read_residual(batch)).double()
    wanted = torch.outer(residual, u) / (u @ (mean if is_averaged else keys[0]))
    assert editor.update_layers(batch, target)
    assert editor.deltas[layer].double().allclose(wanted, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("method", [Rome, RevisedRome])
def test_the_residual_is_met_exactly_at_the_methods_own_key(
    method: type[Rome], setup: MethodSetup
) -> None:
    editor = method(setup)
    batch = editor.build_context_batch([text + FACT.question for text in editor.contexts], FACT)
    target = editor.compute_target(FACT, batch)
    assert target is not None
    residual = target - editor.read_residual(batch)
    key = editor.choose_key(editor.read_keys(editor.last_layer, batch))
    assert editor.update_layers(batch, target)
    moved = editor.deltas[editor.last_layer] @ key
    assert moved.allclose(residual, rtol=1e-3, atol=1e-4)


def test_a_fact_is_stated_after_its_edit_and_the_next_edit_is_added(setup: MethodSetup) -> None:
    editor = Rome(setup)
    editor.edit([FACT])
    first = editor.deltas[editor.last_layer].clone()
    editor.edit([OTHER])
    assert not editor.deltas[editor.last_layer].equal(first)
    assert editor.not_edited == 0
    assert check_stated(editor.model, [OTHER])[0]


def test_an_update_that_is_not_finite_leaves_the_weights_alone(
    setup: MethodSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where uᵀ k is 0: the edits that were called disabling."""
    editor = Rome(setup)
    monkeypatch.setattr(editor, "choose_key", lambda keys: torch.zeros_like(keys[0]))
    editor.edit([FACT])
    assert editor.not_edited == 1
    weight, base = (f(editor.last_layer) for f in (editor.model.weight, editor.model.base_weight))
    assert weight.equal(base)
