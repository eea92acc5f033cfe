from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from editing_home import seat
from torch import Tensor

from kedit_daemon.bench.methods import gradient_editors
from kedit_daemon.bench.methods.gradient_editors import (
    GradientEditor,
    Malmen,
    Mend,
    UltraEdit,
)
from kedit_daemon.bench.methods.gradient_pairs import make_target_row, read_gradient_pairs
from kedit_daemon.bench.methods.hypernetwork import (
    Hypernetwork,
    load_hypernetwork,
    save_hypernetwork,
    solve_shifts,
)
from kedit_daemon.bench.methods.method import MethodSetup
from kedit_daemon.editing.model_loading import LoadedModel
from memory.errors import KeditError
from memory.facts import Fact
from memory.model.editable import EditableModel
from memory.model.scoring import PromptAnswer, score_answers

FACTS = [seat(1, "Oslo"), seat(2, "Lima"), seat(3, "Cairo")]
LAYERS = (1, 2)


@pytest.fixture
def setup(load: Callable[[str], LoadedModel], tmp_path: Path) -> MethodSetup:
    return MethodSetup(load("llama"), tmp_path, batch_size=1, seed=0)


@pytest.fixture
def known(setup: MethodSetup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of what is known of the model, with untrained networks."""
    model = setup.loaded_model.model
    size = sum(model.base_weight(LAYERS[0]).shape)
    monkeypatch.setattr(gradient_editors, "locate_known", lambda _hash: tmp_path)
    torch.manual_seed(0)
    for editor in (Mend, Malmen):
        save_hypernetwork(fit_network(model, size), tmp_path / editor.network_file)
    return tmp_path


def fit_network(model: EditableModel, size: int) -> Hypernetwork:
    network = Hypernetwork(LAYERS, size, rank=4, rate=1e-2)
    rows = [make_target_row(model, fact) for fact in FACTS]
    pairs, _ = read_gradient_pairs(model, LAYERS, rows, answers_only=False)
    for place, n in enumerate(LAYERS):
        network.fit_inputs(place, pairs[n].keys, pairs[n].gradients)
    return network


def loss(model: EditableModel, fact: Fact) -> float:
    ids = tuple(model.encode_target(fact.question, fact.target))
    return score_answers(model, [PromptAnswer(tuple(model.encode(fact.question)), ids)])[0].loss


def test_gradients_are_those_of_the_losses_in_the_outputs(setup: MethodSetup) -> None:
    """Along a small change of the output the loss changes as its gradient says."""
    model, row = setup.loaded_model.model, make_target_row(setup.loaded_model.model, FACTS[0])
    pairs, losses = read_gradient_pairs(model, [1], [row], answers_only=False)
    gradient = pairs[1].gradients
    step = 1e-2 * gradient / gradient.norm()

    def move(_inputs: Tensor, outputs: Tensor) -> Tensor:
        moved = outputs.clone()
        moved[0, : len(step)] += step
        return moved

    with model.tap_layers({1: move}):
        _, after = read_gradient_pairs(model, [2], [row], answers_only=False)
    assert float(after - losses) == pytest.approx(1e-2 * float(gradient.norm()), rel=0.05)


def test_tokens_that_predict_nothing_of_the_target_are_left_out_on_request(
    setup: MethodSetup,
) -> None:
    model = setup.loaded_model.model
    rows = [make_target_row(model, fact) for fact in FACTS]
    answers = read_gradient_pairs(model, [1], rows, answers_only=True)[0][1]
    everything = read_gradient_pairs(model, [1], rows, answers_only=False)[0][1]
    assert answers.owners.bincount().tolist() == [len(row.target) for row in rows]
    assert everything.owners.bincount().tolist() == [len(row.ids) - 1 for row in rows]
    first = everything.keys[everything.owners == 0][rows[0].prompt_length - 1 :]
    assert answers.keys[answers.owners == 0].equal(first)


def test_shifts_are_met_at_their_keys() -> None:
    torch.manual_seed(0)
    keys, shifts = torch.randn(3, 12), torch.randn(3, 5)
    update = solve_shifts(keys, shifts, 1e-6)
    assert (update @ keys.T).T.allclose(shifts, atol=1e-3)
    dense = shifts.T @ keys @ torch.linalg.inv(keys.T @ keys + 0.5 * torch.eye(12))
    assert solve_shifts(keys, shifts, 0.5).allclose(dense, atol=1e-4)


@pytest.mark.parametrize("editor", [UltraEdit, Mend, Malmen])
def test_an_edit_makes_its_target_likelier_and_the_next_is_added(
    editor: type[GradientEditor], setup: MethodSetup, known: Path
) -> None:
    method = editor(setup)
    before = loss(method.model, FACTS[0])
    method.edit(FACTS[:1])
    assert loss(method.model, FACTS[0]) < before
    first = {n: delta.clone() for n, delta in method.deltas.items()}
    method.edit(FACTS[1:])
    assert all(not method.deltas[n].equal(first[n]) for n in method.edited_layers)
    assert method.last_gradient > 0 and method.not_edited == 0
    for n in method.edited_layers:
        moved = method.model.weight(n) - method.model.base_weight(n)
        assert moved.allclose(method.deltas[n], atol=1e-5)


def test_the_normaliser_runs_over_the_whole_stream(setup: MethodSetup) -> None:
    method, tokens = UltraEdit(setup), torch.randn(40, 6) * 3 + 1
    for part in tokens.split(7):
        method._count_tokens(part)
    assert method.mean.allclose(tokens.mean(0), atol=1e-5)
    assert (method.squares / method.count).allclose(tokens.var(0, correction=0), atol=1e-4)


def test_a_network_is_kept_with_its_layers(known: Path) -> None:
    network = load_hypernetwork(known / Mend.network_file)
    assert network.layers == LAYERS
    again = known / "again.kedit"
    save_hypernetwork(network, again)
    for name, tensor in load_hypernetwork(again).state_dict().items():
        assert tensor.equal(network.state_dict()[name])


@pytest.mark.parametrize("editor", [Mend, Malmen])
def test_a_model_without_a_network_is_told_so(
    editor: type[GradientEditor], setup: MethodSetup
) -> None:
    with pytest.raises(KeditError, match=r"has been trained for .*") as error:
        editor(setup)
    assert "tools.train_hypernetworks" in str(error.value.hint)


def test_an_update_that_is_not_finite_leaves_the_weights_alone(
    setup: MethodSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = UltraEdit(setup)
    monkeypatch.setattr(gradient_editors, "ULTRA_RATE", float("nan"))
    method.edit(FACTS[:2])
    assert method.not_edited == 2
    n = method.edited_layers[0]
    assert method.model.weight(n).equal(method.model.base_weight(n))
