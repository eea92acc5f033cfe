from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from editing_home import seat
from tiny_models import save_model

from kedit_daemon.bench.methods.method import MethodSetup
from kedit_daemon.bench.methods.reference_memit import (
    ReferenceMemit,
    sample_prefixes,
    solve_dense_update,
)
from kedit_daemon.editing.model_loading import LoadedModel, load_model
from memory.errors import KeditError
from memory.facts import Fact
from memory.model.editable import EditableModel
from memory.model.scoring import PromptAnswer, score_answers
from policies.solver import RidgeSolver

FACTS = [seat(1, "Oslo"), seat(2, "Lima")]


@pytest.fixture
def setup(load: Callable[[str], LoadedModel], tmp_path: Path) -> MethodSetup:
    return MethodSetup(load("llama"), tmp_path, batch_size=1, seed=0)


def loss(model: EditableModel, fact: Fact) -> float:
    ids = tuple(model.encode_target(fact.question, fact.target))
    return score_answers(model, [PromptAnswer(tuple(model.encode(fact.question)), ids)])[0].loss


def test_the_dense_solve_is_the_normal_equations() -> None:
    torch.manual_seed(0)
    keys, residuals = torch.randn(3, 12), torch.randn(3, 5)
    samples = torch.randn(40, 12)
    covariance = samples.T @ samples / 40
    update = solve_dense_update(covariance, 2.0, 0.0, keys, residuals)
    left = update @ (2.0 * covariance + keys.T @ keys).double()
    assert left.allclose((residuals.T @ keys).double(), atol=1e-4)
    # Without a prior to speak of, the keys give just what was asked.
    exact = solve_dense_update(covariance, 1e-8, 0.0, keys, residuals)
    assert (exact @ keys.T.double()).allclose(residuals.T.double(), atol=1e-4)


@pytest.mark.parametrize("count", [1, 4, 30])
def test_the_fast_solver_gives_what_the_dense_solve_gives(count: int) -> None:
    torch.manual_seed(count)
    keys, residuals = torch.randn(count, 12), torch.randn(count, 5)
    samples = torch.randn(40, 12)
    covariance = samples.T @ samples / 40
    slow = solve_dense_update(covariance, 3.0, 0.1, keys, residuals)
    fast = RidgeSolver(covariance, 3.0, 0.1).solve(keys, residuals)
    assert fast.double().allclose(slow, atol=1e-5)


def test_prefixes_are_the_models_own_and_follow_from_the_seed(model: EditableModel) -> None:
    first, again, other = (sample_prefixes(model, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len(first) == 5
    assert first[0].startswith("The") and first[-1].startswith("You")
    assert all(text.endswith(". ") and "\n" not in text for text in first)


def test_the_target_is_inside_the_clamp_and_makes_the_answer_likelier(setup: MethodSetup) -> None:
    method, fact = ReferenceMemit(setup), FACTS[0]
    asked = method.build_context_batch([text + fact.question for text in method.contexts], fact)
    wanted = method.compute_target(fact, asked)
    assert wanted is not None
    length = float((wanted - method.read_residual(asked)).norm())
    room = (
        setup.loaded_model.site.clamp * setup.loaded_model.statistics[method.last_layer].median_norm
    )
    assert 0 < length <= room * 1.001
    assert len(asked.rows) == 6
    ids = method.model.encode_target(fact.question, fact.target)
    assert asked.rows[0].target == tuple(ids)  # no end of text, as published


def test_an_edit_brings_the_stream_to_its_target_and_the_next_one_builds_on_it(
    setup: MethodSetup,
) -> None:
    method = ReferenceMemit(setup)
    model, (one, two) = method.model, FACTS
    before = [loss(model, f) for f in FACTS]
    method.edit([one])
    assert loss(model, one) < before[0] / 2
    kept = {n: d.clone() for n, d in method.deltas.items()}
    method.edit([two])
    assert loss(model, two) < before[1] / 2
    assert method.not_edited == 0
    changed = [
        n for n in range(model.layer_count) if not model.weight(n).equal(model.base_weight(n))
    ]
    assert changed == list(method.layers)
    for n in method.layers:
        assert not method.deltas[n].equal(kept[n])
        applied = model.weight(n) - model.base_weight(n)
        assert applied.allclose(method.deltas[n], atol=1e-4)
    assert set(method.stopwatch.seconds_by_part) == {"targets", "solve"}
    model.set_deltas({})


def test_numbers_that_are_not_finite_leave_the_weights_alone(setup: MethodSetup) -> None:
    method = ReferenceMemit(setup)
    method.edit(FACTS[:1])
    before = method.model.weights_hash(range(method.model.layer_count))
    statistics = setup.loaded_model.statistics
    layer = statistics[method.last_layer]
    broken = torch.full_like(layer.covariance, torch.nan)
    statistics[method.last_layer] = replace(layer, key_covariance=broken)
    method.edit(FACTS[1:])
    assert method.not_edited == 1
    assert method.model.weights_hash(range(method.model.layer_count)) == before
    method.model.set_deltas({})


def test_the_models_last_layer_is_refused(tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model", num_hidden_layers=2)
    setup = MethodSetup(load_model(str(folder), "cpu", tmp_path, iter), tmp_path, 1, 0)
    with pytest.raises(KeditError, match="the model's last") as caught:
        ReferenceMemit(setup)
    assert caught.value.code == "unsupported"
