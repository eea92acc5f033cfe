from collections.abc import Callable
from pathlib import Path

import pytest
from study_tools import given

from kedit_daemon.bench.methods.solver_presets import PRESETS, PresetStream
from kedit_daemon.bench.plot import open_figure
from kedit_daemon.bench.studies import churn
from kedit_daemon.bench.studies.shared import compute_stream_terms, measure_figures
from kedit_daemon.editing.model_loading import LoadedModel


def test_what_is_replaced_leaves_no_trace_and_what_is_stacked_does(
    load: Callable[[str], LoadedModel], tmp_path: Path
) -> None:
    study = churn.ChurnStudy(rounds=2)
    # Of two facts each takes the other's target, and after two rounds its own again.
    work = given(load("llama"), 2, 1)
    result = study.run(work)
    replaced, stacked = ([r for r in result["rows"] if r["way"] == way] for way in churn.WAYS)
    assert [row["edits"] for row in replaced] == [row["edits"] for row in stacked] == [2, 4, 6]
    assert [row["reliability_strict"] for row in replaced] == [1.0] * 3
    assert all(row["locality_strict"] is not None for row in result["rows"])
    first, swapped, again = (row["norm_ratio"] for row in replaced)
    assert first == again != swapped
    assert stacked[0]["norm_ratio"] != stacked[2]["norm_ratio"]
    stream = PresetStream(PRESETS["memit"], work.loaded_model.site, work.loaded_model.statistics)
    for _, terms in compute_stream_terms(work):
        work.loaded_model.model.set_deltas(stream.add([terms]))
    assert stacked[0]["norm_ratio"] == pytest.approx(
        measure_figures(work.loaded_model)["norm_ratio"], rel=1e-3
    )
    most = max(abs(swapped[name] / first[name] - 1) for name in first)
    assert result["norm_deviation_percent"]["replaced"] == {
        "end": 0.0,
        "most": pytest.approx(100 * most),
    }
    assert (result["failed"], result["not_edited"]) == (None, 0)
    lines = list(study.format_lines(result))
    assert [line.split()[:2] for line in lines[1:4]] == [["replaced", n] for n in "246"]
    pytest.importorskip("matplotlib")
    with open_figure(tmp_path / "out.png") as (left, right):
        study.draw_curves(result, left, right)
    assert len(left.lines) == 2 and len(right.lines) == 4
