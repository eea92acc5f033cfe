from collections.abc import Callable
from pathlib import Path

import pytest
from editing_home import seat

from kedit_daemon.bench.methods.baselines import InContext, Unedited
from kedit_daemon.bench.methods.method import Method, MethodSetup, Stopwatch
from kedit_daemon.bench.methods.method_catalog import METHODS, import_method
from kedit_daemon.editing.model_loading import LoadedModel

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


def test_a_stopwatch_adds_up_also_when_the_work_fails() -> None:
    watch = Stopwatch()
    watch.add_seconds("solve", 1.0)
    with pytest.raises(ValueError, match="no"), watch.time_part("solve"):
        raise ValueError("no")
    with watch.time_part("probe"):
        pass
    assert watch.seconds_by_part["solve"] > 1.0
    assert list(watch.seconds_by_part) == ["solve", "probe"]
