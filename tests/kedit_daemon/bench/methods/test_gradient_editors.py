from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from editing_home import seat
from torch import Tensor

from kedit_daemon.bench.methods import gradient_editors, gradient_pairs
from kedit_daemon.bench.methods.gradient_editors import (
    GradientEditor,
    HypernetworkEditor,
    Malmen,
    Mend,
    UltraEdit,
)
from kedit_daemon.bench.methods.gradient_pairs import (
    GradientPairs,
    choose_last_layers,
    make_target_row,
    read_gradient_pairs,
)
from kedit_daemon.bench.methods.hypernetwork import (
    Hypernetwork,
    load_hypernetwork,
    save_hypernetwork,
    solve_shifts,
)
from kedit_daemon.bench.methods.method import MethodSetup
from kedit_daemon.editing.known_measurements import locate_known
from kedit_daemon.editing.model_loading import LoadedModel, open_model
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


def test_a_network_is_kept_with_its_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Hypernetwork(LAYERS, 10, rank=2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += torch.randn_like(parameter)
    save_hypernetwork(network, tmp_path / "again.kedit")
    again = load_hypernetwork(tmp_path / "again.kedit")
    assert again.layers == LAYERS
    for name, tensor in network.state_dict().items():  # in float16
        assert again.state_dict()[name].allclose(tensor, rtol=1e-3, atol=1e-3)


def make_network() -> tuple[Hypernetwork, Tensor, Tensor]:
    """Return a network with weights of any size, three keys of 6 and gradients of 4."""
    torch.manual_seed(0)
    network, keys, gradients = Hypernetwork((1, 2), 10, 2), torch.randn(3, 6), torch.randn(3, 4)
    network.requires_grad_(False)
    for parameter in network.parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    network.fit_inputs(1, torch.randn(20, 6) * 2 + 1, torch.randn(20, 4))
    return network, keys, gradients


def transform_plainly(
    network: Hypernetwork, keys: Tensor, gradients: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Run MEND's network for the second layer, token by token."""
    made = []
    for key, gradient in zip(keys, gradients, strict=True):
        x = (torch.cat([key, gradient]) - network.means[1]) / network.deviations[1]
        for block in network.blocks:
            inner = block.up @ (block.down @ x) + block.bias
            x = x + torch.relu(block.scales[1] * inner + block.offsets[1])
        made.append((x[:6], x[6:]))
    return made


def test_mend_adds_the_outer_products_of_what_its_network_makes() -> None:
    network, keys, gradients = make_network()
    up, down = network.compute_mend_factors(1, keys, gradients)
    rate = network.log_rates[1].exp()
    made = transform_plainly(network, keys, gradients)
    wanted = sum(-rate * torch.outer(gradient, key) for key, gradient in made)
    assert (up.T @ down).allclose(torch.as_tensor(wanted), rtol=1e-4, atol=1e-5)


def test_malmen_meets_the_shifts_at_the_keys_by_least_squares() -> None:
    network, keys, gradients = make_network()
    rate, ridge = network.log_rates[1].exp(), network.log_ridges[1].exp()
    made = transform_plainly(network, keys, gradients)
    shifts = [-rate * (m @ key) * d for key, (m, d) in zip(keys, made, strict=True)]
    inverse = torch.linalg.inv(keys.T @ keys + ridge * torch.eye(6))
    wanted = torch.stack(shifts).T @ keys @ inverse
    assert network.compute_malmen_update(1, keys, gradients).allclose(wanted, rtol=1e-3, atol=1e-4)


def test_ultraedit_shifts_along_the_normalised_gradient(setup: MethodSetup) -> None:
    method = UltraEdit(setup)
    pairs = GradientPairs(torch.randn(9, 6), torch.randn(9, 4), torch.zeros(9))
    update = method.compute_updates({1: pairs})[1]
    inputs = torch.cat([pairs.keys, pairs.gradients], 1)
    normal = (inputs - inputs.mean(0)) / inputs.std(0, correction=0)
    sizes = normal[:, :6].square().sum(1, keepdim=True)
    shifts = -gradient_editors.ULTRA_RATE * sizes * normal[:, 6:]
    inverse = torch.linalg.inv(pairs.keys.T @ pairs.keys + torch.eye(6))
    assert update.allclose(shifts.T @ pairs.keys @ inverse, rtol=1e-3, atol=1e-6)


def test_many_rows_are_read_in_parts(setup: MethodSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    model = setup.loaded_model.model
    rows = [make_target_row(model, fact) for fact in FACTS]
    whole, losses = read_gradient_pairs(model, [1], rows, answers_only=True)
    monkeypatch.setattr(gradient_pairs, "ROWS_PER_PASS", 2)
    parts, again = read_gradient_pairs(model, [1], rows, answers_only=True)
    assert parts[1].owners.equal(whole[1].owners)
    assert parts[1].keys.allclose(whole[1].keys, atol=1e-5)
    assert parts[1].gradients.allclose(whole[1].gradients, atol=1e-5)
    assert again.allclose(losses, atol=1e-5)


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


def test_a_damaged_network_is_named(known: Path, setup: MethodSetup) -> None:
    (known / Mend.network_file).write_bytes(b"no network")
    with pytest.raises(KeditError, match=r"mend\.kedit cannot be read"):
        Mend(setup)


@pytest.mark.parametrize("editor", [Mend, Malmen])
def test_the_shipped_model_has_networks_that_edit_it(
    editor: type[HypernetworkEditor], tmp_path: Path
) -> None:
    opened = open_model("shipped", "cpu", tmp_path)
    network = load_hypernetwork(locate_known(opened.base_hash) / editor.network_file)
    assert network.layers == choose_last_layers(opened.model)
    assert all(bool(block.up.any()) for block in network.blocks)
    size = sum(opened.model.base_weight(network.layers[0]).shape)
    assert network.means.shape == (len(network.layers), size)
