from collections.abc import Callable
from dataclasses import replace

import pytest
from study_tools import given

from kedit_daemon.bench.methods.solver_presets import PRESETS
from kedit_daemon.bench.studies.presets import PresetStudy
from kedit_daemon.editing.model_loading import LoadedModel


def test_each_preset_has_its_curve_and_one_that_fails_ends(
    load: Callable[[str], LoadedModel],
) -> None:
    study = PresetStudy(curve_points=3)
    result = study.run(given(load("llama"), 5, 1))
    curves = {name: [r for r in result["rows"] if r["preset"] == name] for name in PRESETS}
    # so little text leaves no direction of a tiny model quiet
    assert curves.pop("alphaedit") == []
    end = result["presets"]["alphaedit"]
    assert end["columns"] is None and "no direction" in end["failed"]
    for name, rows in curves.items():
        assert [row["edits"] for row in rows] == [2, 4, 5]
        assert result["presets"][name]["failed"] is None
        assert result["presets"][name]["columns"]["generality"]["strict"] is not None
    assert curves["memit-mass"][-1]["oldest_strict"] == 1.0
    # residuals against the weights as they are, and earlier keys: the joint solve, batch by batch
    for joint, batched in zip(curves["memit-mass"], curves["encore"], strict=True):
        assert joint["norm_ratio"] == pytest.approx(batched["norm_ratio"])
    assert curves["memit"][-1]["norm_ratio"] != curves["memit-mass"][-1]["norm_ratio"]
    lines = list(study.format_lines(result))
    assert any(line.startswith("alphaedit ended early: no direction") for line in lines)


def test_the_oldest_and_the_newest_are_asked_apart(
    load: Callable[[str], LoadedModel],
) -> None:
    study = PresetStudy(("memit",), cohort_size=1)
    work = given(load("llama"), 2, 1)
    clash = replace(work.records[1], fact=replace(work.records[0].fact, target="Lima"))
    rows = study.run(replace(work, records=[work.records[0], clash]))["rows"]
    assert [(row["oldest_strict"], row["newest_strict"]) for row in rows] == [(1, 1), (0, 1)]
