from collections.abc import Callable
from pathlib import Path

import pytest
from study_tools import records, straight

from kedit_daemon.bench.dataset import Skipped, Stream
from kedit_daemon.bench.studies import cost, index, norm_growth, prompts
from kedit_daemon.bench.studies.study import Study, conduct, drawn, told
from kedit_daemon.bench.studies.study_catalog import LIMITS, STUDIES, study_named
from kedit_daemon.editing.model_loading import Loaded

SHARED = {"study", "model", "site", "seed", "commit", "device", "facts", "skipped", "batch_size"}


def test_every_name_has_its_study() -> None:
    names = {"exactness", "churn", "presets", "capacity", "routing", "index", "cost", "norms"}
    names |= {"poison"}
    assert set(STUDIES) == names
    assert all(isinstance(study_named(name), Study) for name in STUDIES)
    assert set(LIMITS) <= set(STUDIES)


@pytest.mark.parametrize(
    "name", ["exactness", "presets", "capacity", "routing", "index", "cost", "norms"]
)
def test_a_study_is_told_drawn_and_leaves_the_model_as_it_was(
    load: Callable[[str], Loaded], tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(index, "SIZES", (20, 40))
    monkeypatch.setattr(prompts, "TEXTS", 20)
    monkeypatch.setattr(norm_growth, "POINTS", 1)
    monkeypatch.setattr(norm_growth, "WAYS", {"lora": norm_growth.WAYS["lora"]})
    for name_of, few in (("KEYS", 20), ("LENGTHS", (16,)), ("TRIED", 4), ("ROUNDS", 1)):
        monkeypatch.setattr(cost, name_of, few)
    loaded, study = load("llama"), study_named(name)
    base = loaded.model.weights_hash(range(loaded.model.layers))
    stream = Stream(tuple(records(3)), (Skipped(3, "broken"),))
    result = conduct(name, study, loaded, stream, 3, 7, straight)
    assert loaded.model.weights_hash(range(loaded.model.layers)) == base
    assert SHARED | {"rows"} <= set(result)
    assert (result["study"], result["seed"], result["batch_size"]) == (name, 7, 3)
    assert (result["facts"], result["skipped"]) == (3, 1)
    lines = list(told(study, result))
    assert lines[0].startswith(f"{name}: 3 facts, 1 records skipped, batches of 3, seed 7, on ")
    drawn(study, result, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
