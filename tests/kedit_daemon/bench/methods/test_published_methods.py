from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from editing_home import seat
from tiny_models import CITIES

from kedit_daemon.bench.methods.method import MethodSetup
from kedit_daemon.bench.methods.method_catalog import METHODS, import_method
from kedit_daemon.bench.methods.published_methods import AlphaEdit, Memit
from kedit_daemon.bench.methods.solver_presets import PRESETS
from kedit_daemon.editing.model_loading import LoadedModel
from memory.errors import KeditError
from memory.facts import Fact

FACTS = [seat(n, CITIES[n % len(CITIES)]) for n in range(6)]
NAMES = [name for name, where in METHODS.items() if where.startswith("published_methods:")]


@pytest.fixture
def setup(load: Callable[[str], LoadedModel], tmp_path: Path) -> MethodSetup:
    return MethodSetup(load("llama"), tmp_path, batch_size=3, seed=0)


def test_every_preset_but_the_daemons_own_is_here() -> None:
    assert set(NAMES) == set(PRESETS) - {"memit-mass"}


@pytest.mark.parametrize("name", [n for n in NAMES if n != "alphaedit"])
def test_each_name_runs_its_own_preset_in_every_edited_layer(setup: MethodSetup, name: str) -> None:
    model, edited = setup.loaded_model.model, setup.loaded_model.site.layers
    method = import_method(name)(setup)
    assert getattr(method, "preset", None) == name
    method.edit(FACTS[:3])
    changed = [
        n for n in range(model.layer_count) if not model.weight(n).equal(model.base_weight(n))
    ]
    assert changed == list(edited)
    assert method.not_edited == 0 and method.count_stored_bytes() > 0
    assert set(method.stopwatch.seconds_by_part) == {"targets", "solve"}


def test_a_covariance_without_a_null_space_is_told_at_once(setup: MethodSetup) -> None:
    with pytest.raises(KeditError) as caught:
        AlphaEdit(setup)  # so little text leaves no direction of a tiny model quiet
    assert (caught.value.code, bool(caught.value.hint)) == ("singular", True)


def test_batches_are_stacked(setup: MethodSetup) -> None:
    layer = setup.loaded_model.site.layers[0]
    model, method = setup.loaded_model.model, Memit(setup)
    method.edit(FACTS[:3])
    first = model.weight(layer).clone()
    method.edit(FACTS[3:])
    second = model.weight(layer).clone()
    alone = Memit(setup)
    alone.edit(FACTS[3:])
    moved = second - first
    assert not torch.allclose(moved, model.weight(layer) - model.base_weight(layer), atol=1e-6)
    assert float(moved.norm()) > 0


def test_a_fact_without_targets_is_left_out_and_counted(setup: MethodSetup) -> None:
    method = Memit(setup)
    method.edit([FACTS[0], Fact("x", "{} is", "Rome " * 300)])
    assert method.not_edited == 1
    kept = method.count_stored_bytes()
    alone = Memit(setup)
    alone.edit(FACTS[:1])
    assert kept == alone.count_stored_bytes()
