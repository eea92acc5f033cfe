from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from editing_home import seat

from kedit_daemon.bench.methods.baselines import LORA_RANK, FineTuning, InContext, Lora, Unedited
from kedit_daemon.bench.methods.method import Method, MethodSetup, Stopwatch
from kedit_daemon.bench.methods.method_catalog import METHODS, import_method
from kedit_daemon.editing.model_loading import LoadedModel
from memory.model.generate import generate_answers

FACTS = [seat(1, "Oslo"), seat(2, "Lima"), seat(3, "Cairo")]
Load = Callable[[str], LoadedModel]


@pytest.fixture
def setup(load: Load, tmp_path: Path) -> MethodSetup:
    return MethodSetup(load("llama"), tmp_path, batch_size=2, seed=0)


def weights_hash(setup: MethodSetup) -> str:
    return setup.loaded_model.model.weights_hash(range(setup.loaded_model.model.layer_count))


@pytest.mark.parametrize("name", METHODS)
def test_every_name_is_a_method(name: str) -> None:
    assert issubclass(import_method(name), Method)


def test_without_an_edit_nothing_changes(setup: MethodSetup) -> None:
    before, method = weights_hash(setup), Unedited(setup)
    method.edit(FACTS[:2])
    method.edit(FACTS[2:])
    assert (weights_hash(setup), method.not_edited, method.count_stored_bytes()) == (before, 3, 0)
    assert method.overlay is None
    assert method.frame_prompt(FACTS[0], "In Oslo") == "In Oslo"


def test_in_context_states_the_fact_first_and_changes_no_weight(setup: MethodSetup) -> None:
    before, method = weights_hash(setup), InContext(setup)
    method.edit(FACTS)
    assert (weights_hash(setup), method.not_edited) == (before, 0)
    said = method.frame_prompt(FACTS[0], "Where is it?")
    assert said == "The seat of country 1 is Oslo. Where is it?"
    one = InContext(setup)
    one.edit(FACTS[:1])
    assert one.count_stored_bytes() == len("The seat of country 1 is Oslo.")


def test_fine_tuning_says_the_targets_and_stops(setup: MethodSetup) -> None:
    model, method = setup.loaded_model.model, FineTuning(setup)
    for _ in range(4):  # a random model learns slowly
        method.edit(FACTS)
    said = generate_answers(model, [f.question for f in FACTS], 12)
    assert said == ["Oslo", "Lima", "Cairo"]  # and nothing after: the end is learned too


def test_fine_tuning_changes_one_layer_and_goes_on_from_what_it_has(setup: MethodSetup) -> None:
    model, method = setup.loaded_model.model, FineTuning(setup)
    method.edit(FACTS[:1])
    first = method.delta.clone()
    changed = [
        n for n in range(model.layer_count) if not model.weight(n).equal(model.base_weight(n))
    ]
    assert changed == [setup.loaded_model.site.layers[-1]]
    method.edit(FACTS[1:])
    moved = (method.delta - first).norm()
    assert 0 < moved < 2 * first.norm() and not method.delta.equal(first)
    found = model.weight(method.layer) - model.base_weight(method.layer)
    assert found.allclose(method.delta, atol=1e-5)
    assert set(method.stopwatch.seconds_by_part) == {"steps"}


def test_lora_adds_a_change_of_low_rank_for_every_batch(setup: MethodSetup) -> None:
    model, method = setup.loaded_model.model, Lora(setup)
    method.edit(FACTS[:1])
    first = method.delta.clone()
    method.edit(FACTS[1:])
    for change in (first, method.delta - first):
        values = torch.linalg.svdvals(change)
        assert values[LORA_RANK - 1] > 0 and values[LORA_RANK] < 1e-4 * values[0]
    assert torch.linalg.svdvals(method.delta)[LORA_RANK] > 1e-3
    found = model.weight(method.layer) - model.base_weight(method.layer)
    assert found.allclose(method.delta, atol=1e-5)
    again = Lora(setup)
    again.edit(FACTS[:1])
    assert again.delta.equal(first)


def test_lora_says_the_targets_and_stops(setup: MethodSetup) -> None:
    method = Lora(setup)
    for _ in range(4):  # a random model learns slowly
        method.edit(FACTS)
    assert generate_answers(method.model, [f.question for f in FACTS], 12) == [
        "Oslo",
        "Lima",
        "Cairo",
    ]


def test_a_stopwatch_adds_up_also_when_the_work_fails() -> None:
    watch = Stopwatch()
    watch.add_seconds("solve", 1.0)
    with pytest.raises(ValueError, match="no"), watch.time_part("solve"):
        raise ValueError("no")
    with watch.time_part("probe"):
        pass
    assert watch.seconds_by_part["solve"] > 1.0
    assert list(watch.seconds_by_part) == ["solve", "probe"]
