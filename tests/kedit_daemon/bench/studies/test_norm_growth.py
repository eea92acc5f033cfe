import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from study_tools import given

from kedit_daemon.bench import reference_wise, simple_methods
from kedit_daemon.bench.method import Setup
from kedit_daemon.bench.plot import picture
from kedit_daemon.bench.reference_wise import Memory, ReferenceWise
from kedit_daemon.bench.solver_presets import PRESETS, Stream
from kedit_daemon.bench.studies import norm_growth, reading
from kedit_daemon.bench.studies.norm_growth import SIDE, WAYS, Norms, Way, beside, grown
from kedit_daemon.bench.studies.reading import Reader
from kedit_daemon.bench.studies.shared import terms_of
from kedit_daemon.editing.model_loading import Loaded, canary_text
from kedit_daemon.shipped import read_statements
from memory.model.spectra import effective_rank, singular_values, stable_rank

Load = Callable[[str], Loaded]


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less to read, and fewer steps of what a random model learns in none of them."""
    monkeypatch.setattr(reading, "canary_text", lambda: canary_text()[:4])
    monkeypatch.setattr(reading, "read_statements", lambda: read_statements()[:20])
    monkeypatch.setattr(reference_wise, "STEPS", 2)


def of(result: dict[str, Any], way: str) -> list[dict[str, Any]]:
    return [row for row in result["rows"] if row["way"] == way]


def only(monkeypatch: pytest.MonkeyPatch, **ways: Way) -> None:
    monkeypatch.setattr(norm_growth, "WAYS", ways)


def test_every_way_has_its_curve_and_is_drawn(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(norm_growth, "POINTS", 2)
    work, study = given(load("llama"), 2, 100), Norms()
    result = study.run(work)
    assert result["batch_size"] == 1
    assert {name: [row["edits"] for row in of(result, name)] for name in WAYS} == {
        name: [1, 2] for name in WAYS
    }
    assert [end["failed"] for end in result["ways"].values()] == [None] * len(WAYS)
    sites = {f"layer.{n}.down_proj" for n in work.loaded.site.layers}
    for row in result["rows"]:
        assert set(row["matrices"]) - {SIDE} == sites
        assert len(row["written_ratio"]) == len(row["cka"]) == work.loaded.model.layers
        assert all(0 < cka <= 1 + 1e-9 for cka in row["cka"])
    for name in ("ft", "lora", "memit", "no policy"):
        first, last = of(result, name)
        assert 1 < grown(first, "norm_ratio") != grown(last, "norm_ratio")
        assert grown(last, "effective_rank") > 1 and math.isnan(beside(last, "norm_ratio"))
        assert grown(last, "subspace_shift") > 0 and min(last["cka"]) < 1 - 1e-6
        assert last["perplexity_ratio"] != 1
    for wise in of(result, "wise"):  # the copy changes, and the weights never do
        assert grown(wise, "norm_ratio") == 1 != beside(wise, "norm_ratio")
        assert grown(wise, "effective_rank") == 0 < beside(wise, "effective_rank")
    assert of(result, "no policy")[-1]["all_strict"] == 1.0
    lines = list(study.lines(result))
    assert [line.split()[:2] for line in lines[1:3]] == [["ft", "1"], ["ft", "2"]]
    assert any(line.startswith("no policy: memit-mass, no policy, not edited 0") for line in lines)
    pytest.importorskip("matplotlib")
    with picture(tmp_path / "out.png", study.panels) as panels:
        study.draw(result, *panels)
    curves = len(WAYS)
    found = [len(panel.lines) for panel in panels]
    assert found == [2 * curves, 2 * curves, curves, curves, curves + 1, curves]


def test_ways_that_take_each_fact_alone_end_after_the_first_facts(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(norm_growth, "ONE_BY_ONE", 1)
    only(monkeypatch, ft=WAYS["ft"], memit=WAYS["memit"])
    result = Norms().run(given(load("llama"), 2, 100))
    assert [row["edits"] for row in of(result, "ft")] == [1]
    assert [row["edits"] for row in of(result, "memit")] == [1, 2]


def test_figures_are_of_the_weights_as_they_are(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, memit=Way("memit"))
    monkeypatch.setattr(norm_growth, "POINTS", 1)
    work = given(load("llama"), 3, 2)
    result = Norms().run(work)
    (row,) = result["rows"]
    assert result["batch_size"] == 2  # and the point comes after the second batch
    loaded, model = work.loaded, work.loaded.model
    assert model.weight(loaded.layers[0]).equal(model.base_weight(loaded.layers[0]))
    before = Reader(model).read(None)
    stream, terms = Stream(PRESETS["memit"], loaded.site, loaded.statistics), terms_of(work)
    stream.add([each for _, each in terms[:2]])
    deltas = stream.add([each for _, each in terms[2:]])
    model.set_deltas(deltas)
    now = Reader(model).read(None)
    assert row["perplexity_ratio"] == pytest.approx(now.perplexity / before.perplexity, rel=1e-4)
    for n in range(model.layers):
        assert row["written_ratio"][n] == pytest.approx(
            now.written[n] / before.written[n], rel=1e-4
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
    only(monkeypatch, ft=Way("ft", one_by_one=True), memit=Way("memit"))
    monkeypatch.setattr(norm_growth, "POINTS", 2)
    broken = list[int]()
    put = simple_methods.FineTuning._put

    def breaking(method: simple_methods.FineTuning, delta: torch.Tensor) -> None:
        broken.append(1)
        put(method, delta * (1e30 if len(broken) > 2 else 1))

    monkeypatch.setattr(simple_methods.FineTuning, "_put", breaking)
    study = Norms()
    result = study.run(given(load("llama"), 3, 100))
    assert [row["edits"] for row in of(result, "ft")] == [2]
    assert [row["edits"] for row in of(result, "memit")] == [2, 3]
    assert "after 3 edits" in result["ways"]["ft"]["failed"]
    assert result["ways"]["memit"]["failed"] is None
    assert any(
        line.startswith("ft: ft, not edited 0; ended early:") for line in study.lines(result)
    )


def test_the_oldest_and_the_newest_are_asked_apart(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(monkeypatch, memit=Way("memit"))
    monkeypatch.setattr(norm_growth, "OLDEST", 1)
    work = given(load("llama"), 2, 100)
    clash = replace(work.records[1], fact=replace(work.records[0].fact, target="Lima"))
    rows = Norms().run(replace(work, records=[work.records[0], clash]))["rows"]
    found = [(row["oldest_strict"], row["newest_strict"], row["all_strict"]) for row in rows]
    assert found == [(1, 1, 1), (0, 1, 0.5)]


def test_a_side_memory_is_asked_and_read_with_what_lies_over_the_weights(
    load: Load, tmp_path: Path
) -> None:
    work = given(load("llama"), 2, 100)
    model, probe = work.loaded.model, norm_growth._Probe(work)
    setup = Setup(work.loaded, tmp_path, 100, 0)
    tuned, side = simple_methods.FineTuning(setup), ReferenceWise(setup)
    tuned.layer = side.layer
    tuned.delta = torch.zeros_like(model.base_weight(side.layer))
    for _ in range(4):
        tuned.edit([record.fact for record in work.records])
    wanted = probe.point(tuned, 2, 2)
    model.set_deltas({})
    side.merged = [Memory(tuned.delta / 2, math.inf), Memory(tuned.delta, 0.0)]
    found = probe.point(side, 2, 2)
    bare = probe.point(tuned, 2, 2)
    assert (found["all_strict"], wanted["all_strict"], bare["all_strict"]) == (1, 1, 0)
    assert found["perplexity_ratio"] == pytest.approx(wanted["perplexity_ratio"], rel=1e-4)
    assert found["cka"] == pytest.approx(wanted["cka"], rel=1e-4)
    assert bare["perplexity_ratio"] == pytest.approx(1)
    base = model.base_weight(side.layer)
    moved = float((base + tuned.delta).norm() / base.norm())  # of the copy that has gone farthest
    assert beside(found, "norm_ratio") == pytest.approx(moved)
    assert found["matrices"][SIDE]["effective_rank"] == pytest.approx(
        effective_rank(singular_values(tuned.delta))
    )
