import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from study_tools import given

from kedit_daemon.bench.methods import reference_wise
from kedit_daemon.bench.methods.fine_tuning import FineTuning
from kedit_daemon.bench.methods.method import MethodSetup
from kedit_daemon.bench.methods.reference_wise import ReferenceWise, WiseMemory
from kedit_daemon.bench.methods.solver_presets import PRESETS, PresetStream
from kedit_daemon.bench.plot import open_figure
from kedit_daemon.bench.studies import norms
from kedit_daemon.bench.studies.activation_reader import ActivationReader
from kedit_daemon.bench.studies.norms import (
    SIDE_MATRIX,
    WAYS,
    NormGrowthStudy,
    get_edited_figure,
    get_side_figure,
)
from kedit_daemon.bench.studies.shared import compute_stream_terms
from kedit_daemon.editing.model_loading import CanaryTexts, LoadedModel, read_canary_texts
from memory.model.spectra import effective_rank, singular_values, stable_rank

Load = Callable[[str], LoadedModel]
TEXTS = CanaryTexts(read_canary_texts().lines[:4], read_canary_texts().statements[:20])
SmallStudy = partial(NormGrowthStudy, texts=TEXTS)
MEMIT = {"memit": WAYS["memit"]}


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer steps of what a random model learns in none of them."""
    monkeypatch.setattr(reference_wise, "STEPS", 2)


def of(result: dict[str, Any], way: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["way"] == way]


def test_every_way_has_its_curve_and_is_drawn(load: Load, tmp_path: Path) -> None:
    work, study = given(load("llama"), 2, 100), SmallStudy(curve_points=2)
    result = study.run(work)
    assert result["batch_size"] == 1
    able = [name for name in WAYS if name != "mend"]  # it has no network for this model
    assert {name: [row["edits"] for row in of(result, name)] for name in able} == {
        name: [1, 2] for name in able
    }
    failed = {name: end["failed"] for name, end in result["ways"].items() if end["failed"]}
    assert list(failed) == ["mend"] and "has been trained for" in failed["mend"]
    sites = {f"layer.{n}.down_proj" for n in work.loaded_model.site.layers}
    for row in result["rows"]:
        found = set(row["matrices"]) - {SIDE_MATRIX}
        assert found > sites if row["way"] in ("ft-wide", "pretrain") else found == sites
        assert len(row["written_ratio"]) == len(row["cka"]) == work.loaded_model.model.layer_count
        assert all(0 < cka <= 1 + 1e-9 for cka in row["cka"])
    for name in ("ft", "lora", "memit", "no policy"):
        first, last = of(result, name)
        assert 1 < get_edited_figure(first, "norm_ratio") != get_edited_figure(last, "norm_ratio")
        assert get_edited_figure(last, "effective_rank") > 1 and math.isnan(
            get_side_figure(last, "norm_ratio")
        )
        assert get_edited_figure(last, "subspace_shift") > 0 and min(last["cka"]) < 1 - 1e-6
        assert last["perplexity_ratio"] != 1
    for wise in of(result, "wise"):  # the copy changes, and the weights never do
        assert get_edited_figure(wise, "norm_ratio") == 1 != get_side_figure(wise, "norm_ratio")
        assert (
            get_edited_figure(wise, "effective_rank") == 0 < get_side_figure(wise, "effective_rank")
        )
    assert of(result, "no policy")[-1]["all_strict"] == 1.0
    lines = list(study.format_lines(result))
    assert [line.split()[:2] for line in lines[1:3]] == [["pretrain", "1"], ["pretrain", "2"]]
    assert any(line.startswith("no policy: memit-mass, no policy, not edited 0") for line in lines)
    pytest.importorskip("matplotlib")
    with open_figure(tmp_path / "out.png", study.panels) as panels:
        study.draw_curves(result, *panels)
    curves = len(able)
    found = [len(panel.lines) for panel in panels]
    assert found == [2 * curves, 2 * curves, curves, curves, curves + 1, curves]


def test_ways_that_take_each_fact_alone_end_after_the_first_facts(
    load: Load,
) -> None:
    ways = {name: WAYS[name] for name in ("ft", "memit")}
    result = SmallStudy(ways, max_single_facts=1).run(given(load("llama"), 2, 100))
    assert [row["edits"] for row in of(result, "ft")] == [1]
    assert [row["edits"] for row in of(result, "memit")] == [1, 2]


def test_figures_are_of_the_weights_as_they_are(
    load: Load,
) -> None:
    work = given(load("llama"), 3, 2)
    result = SmallStudy(MEMIT, curve_points=1).run(work)
    (row,) = result["rows"]
    assert result["batch_size"] == 2  # and the point comes after the second batch
    loaded, model = work.loaded_model, work.loaded_model.model
    assert model.weight(loaded.layers[0]).equal(model.base_weight(loaded.layers[0]))
    before = ActivationReader(model, TEXTS).read_activations(None)
    stream, terms = (
        PresetStream(PRESETS["memit"], loaded.site, loaded.statistics),
        compute_stream_terms(work),
    )
    stream.add([each for _, each in terms[:2]])
    deltas = stream.add([each for _, each in terms[2:]])
    model.set_deltas(deltas)
    now = ActivationReader(model, TEXTS).read_activations(None)
    assert row["perplexity_ratio"] == pytest.approx(now.perplexity / before.perplexity, rel=1e-4)
    for n in range(model.layer_count):
        assert row["written_ratio"][n] == pytest.approx(
            now.mlp_norms[n] / before.mlp_norms[n], rel=1e-4
        )
    for n, delta in deltas.items():
        found, base = row["matrices"][f"layer.{n}.down_proj"], model.base_weight(n)
        assert found["norm_ratio"] == pytest.approx(float((base + delta).norm() / base.norm()))
        strength = float(singular_values(base + delta)[0] / singular_values(base)[0])
        assert found["spectral_ratio"] == pytest.approx(strength, rel=1e-4)
        assert found["stable_rank"] == pytest.approx(stable_rank(singular_values(delta)), rel=1e-3)
        assert found["effective_rank"] == pytest.approx(
            effective_rank(singular_values(delta)), rel=1e-2
        )


def test_a_way_whose_numbers_break_ends_and_the_others_go_on(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = list[int]()
    put = FineTuning.replace_deltas

    def breaking(method: FineTuning, deltas: Mapping[int, torch.Tensor]) -> None:
        broken.append(1)
        factor = 1e30 if len(broken) > 2 else 1
        put(method, {n: delta * factor for n, delta in deltas.items()})

    monkeypatch.setattr(FineTuning, "replace_deltas", breaking)
    study = SmallStudy({"ft": WAYS["ft"], **MEMIT}, curve_points=2)
    result = study.run(given(load("llama"), 3, 100))
    assert [row["edits"] for row in of(result, "ft")] == [2]
    assert [row["edits"] for row in of(result, "memit")] == [2, 3]
    assert "after 3 edits" in result["ways"]["ft"]["failed"]
    assert result["ways"]["memit"]["failed"] is None
    assert any(
        line.startswith("ft: ft, not edited 0; ended early:") for line in study.format_lines(result)
    )


def test_the_oldest_and_the_newest_are_asked_apart(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norms, "OLDEST_FACTS", 1)
    work = given(load("llama"), 2, 100)
    clash = replace(work.records[1], fact=replace(work.records[0].fact, target="Lima"))
    rows = SmallStudy(MEMIT).run(replace(work, records=[work.records[0], clash]))["rows"]
    found = [(row["oldest_strict"], row["newest_strict"], row["all_strict"]) for row in rows]
    assert found == [(1, 1, 1), (0, 1, 0.5)]


def test_a_side_memory_is_asked_and_read_with_what_lies_over_the_weights(
    load: Load, tmp_path: Path
) -> None:
    work = given(load("llama"), 2, 100)
    model, probe = work.loaded_model.model, norms._CurveProbe(work, TEXTS)
    setup = MethodSetup(work.loaded_model, tmp_path, 100, 0)
    tuned, side = FineTuning(setup), ReferenceWise(setup)
    tuned.layers = (side.layer,)
    tuned.start_layers(tuned.layers)
    for _ in range(4):
        tuned.edit([record.fact for record in work.records])
    wanted = probe.measure_point(tuned, 2, 2)
    model.set_deltas({})
    delta = tuned.deltas[side.layer]
    side.merged_memories = [WiseMemory(delta / 2, math.inf), WiseMemory(delta, 0.0)]
    found = probe.measure_point(side, 2, 2)
    bare = probe.measure_point(tuned, 2, 2)
    assert (found["all_strict"], wanted["all_strict"], bare["all_strict"]) == (1, 1, 0)
    assert found["perplexity_ratio"] == pytest.approx(wanted["perplexity_ratio"], rel=1e-4)
    assert found["cka"] == pytest.approx(wanted["cka"], rel=1e-4)
    assert bare["perplexity_ratio"] == pytest.approx(1)
    base = model.base_weight(side.layer)
    moved = float((base + delta).norm() / base.norm())  # of the copy that has gone farthest
    assert get_side_figure(found, "norm_ratio") == pytest.approx(moved)
    assert found["matrices"][SIDE_MATRIX]["effective_rank"] == pytest.approx(
        effective_rank(singular_values(delta))
    )
