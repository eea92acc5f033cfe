from collections.abc import Callable
from pathlib import Path

import pytest
from study_tools import records, straight

from kedit_daemon.bench.dataset import FactStream, SkippedRecord
from kedit_daemon.bench.studies.cost import CostStudy
from kedit_daemon.bench.studies.index_scaling import IndexStudy
from kedit_daemon.bench.studies.norms import WAYS, NormGrowthStudy
from kedit_daemon.bench.studies.routing_accuracy import RoutingStudy
from kedit_daemon.bench.studies.study import Study, draw_study, format_study, run_study
from kedit_daemon.bench.studies.study_catalog import DEFAULT_LIMITS, STUDIES, import_study
from kedit_daemon.editing.model_loading import LoadedModel

SHARED = {"study", "model", "site", "seed", "commit", "device", "facts", "skipped", "batch_size"}
SMALL_STUDIES = {
    "cost": CostStudy(20, (16,), max_candidates=4, rounds=1),
    "index": IndexStudy((20, 40)),
    "norms": NormGrowthStudy({"lora": WAYS["lora"]}, curve_points=1),
    "routing": RoutingStudy(max_texts=20, prefix_tokens=40),
}


def test_every_name_has_its_study() -> None:
    names = {"exactness", "churn", "presets", "capacity", "routing", "index", "cost", "norms"}
    names |= {"poison", "asking", "hypernetworks", "pictures"}
    assert set(STUDIES) == names
    assert all(isinstance(import_study(name), Study) for name in STUDIES)
    assert set(DEFAULT_LIMITS) <= set(STUDIES)


@pytest.mark.parametrize(
    "name", ["exactness", "presets", "capacity", "routing", "index", "cost", "norms"]
)
def test_a_study_is_told_drawn_and_leaves_the_model_as_it_was(
    load: Callable[[str], LoadedModel], tmp_path: Path, name: str
) -> None:
    pytest.importorskip("matplotlib")
    loaded, study = load("llama"), SMALL_STUDIES.get(name) or import_study(name)
    base = loaded.model.weights_hash(range(loaded.model.layer_count))
    stream = FactStream(tuple(records(3)), (SkippedRecord(3, "broken"),))
    result = run_study(name, study, loaded, stream, 3, 7, straight)
    assert loaded.model.weights_hash(range(loaded.model.layer_count)) == base
    assert SHARED | {"rows"} <= set(result)
    assert (result["study"], result["seed"], result["batch_size"]) == (name, 7, 3)
    assert (result["facts"], result["skipped"]) == (3, 1)
    lines = list(format_study(study, result))
    assert lines[0].startswith(f"{name}: 3 facts, 1 records skipped, batches of 3, seed 7, on ")
    draw_study(study, result, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
