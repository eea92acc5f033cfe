from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from study_tools import given

from kedit_daemon.bench.methods import gradient_editors
from kedit_daemon.bench.methods.fine_tuning import FineTuning
from kedit_daemon.bench.methods.gradient_editors import UltraEdit
from kedit_daemon.bench.plot import open_figure
from kedit_daemon.bench.studies import hypernetworks
from kedit_daemon.bench.studies.hypernetworks import DAEMON, HypernetworkStudy
from kedit_daemon.editing.model_loading import CanaryTexts, LoadedModel, read_canary_texts
from memory.facts import Fact

TEXTS = CanaryTexts(read_canary_texts().lines[:4], read_canary_texts().statements[:20])
Load = Callable[[str], LoadedModel]


def ends(result: dict[str, Any], editor: str) -> list[dict[str, Any]]:
    return [end for end in result["ends"] if end["editor"] == editor]


def test_each_editor_runs_without_and_with_the_guard_and_the_daemon_after(
    load: Load, tmp_path: Path
) -> None:
    work = given(load("llama"), 4, 100)
    study = HypernetworkStudy(editors=("ft", "ultraedit"), curve_points=2, texts=TEXTS)
    result = study.run(work)
    assert [(e["editor"], e["guarded"]) for e in result["ends"]] == [
        ("ft", False),
        ("ft", True),
        ("ultraedit", False),
        ("ultraedit", True),
        (DAEMON, True),
    ]
    assert {(row["editor"], row["guarded"]): row["edits"] for row in result["rows"]} == {
        (e["editor"], e["guarded"]): 4 for e in result["ends"]
    }
    for end in result["ends"]:
        assert end["edits"] == 4 and end["columns"]["reliability"]["strict"] is not None
    free, guarded = ends(result, "ft")
    assert free["kept"] == 4 and free["first_refused"] is None
    assert guarded["kept"] < 4  # fine-tuning a random model breaks its limits
    assert guarded["first_reason"]
    rows = [row for row in result["rows"] if row["editor"] == "ft" and not row["guarded"]]
    assert all(row["norm_ratio"] > 1 and row["update_ratio"] > 0 for row in rows)
    assert all(row["gradient"] > 0 for row in rows)
    assert result["rows"][-1]["norm_ratio"] == 1  # the daemon: in the side memory
    text = "\n".join(study.format_lines(result))
    assert "ft, guarded" in text and f"edit {guarded['first_refused']}: " in text
    with open_figure(tmp_path / "plot.png", 2) as axes:
        study.draw_curves(result, *axes)
    model = work.loaded_model.model
    for n in range(model.layer_count):
        assert model.weight(n).equal(model.base_weight(n))


def test_a_stream_ends_where_a_weight_is_no_number(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(UltraEdit):
        """An editor that adds a NaN at its second edit, without looking."""

        def edit(self, facts: Sequence[Fact]) -> None:
            value = torch.nan if any(bool(d.any()) for d in self.deltas.values()) else 1e-9
            self.add_updates({n: torch.full_like(d, value) for n, d in self.deltas.items()})

    monkeypatch.setattr(hypernetworks, "import_method", lambda _name: Broken)
    result = HypernetworkStudy(editors=("ultraedit",), texts=TEXTS).run(given(load("llama"), 3, 1))
    free, guarded = ends(result, "ultraedit")
    assert free["failed"] == "after 2 edits a weight is NaN or infinite"
    assert (free["edits"], free["columns"]) == (2, None)
    assert guarded["failed"] is None and guarded["edits"] == 3
    assert guarded["first_reason"] == "1 of 1 facts are not stated"
    assert guarded["kept"] == 0


def test_slow_streams_end_after_the_first_facts(load: Load) -> None:
    study = HypernetworkStudy(editors=("ft", "ultraedit"), max_slow_facts=2, texts=TEXTS)
    result = study.run(given(load("llama"), 3, 1))
    assert [end["edits"] for end in result["ends"]] == [2, 2, 3, 2, 2]


def test_an_update_that_is_not_finite_ends_the_stream_or_is_taken_back(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradient_editors, "ULTRA_RATE", float("nan"))
    study = HypernetworkStudy(editors=("ultraedit",), texts=TEXTS)
    free, guarded = ends(study.run(given(load("llama"), 2, 1)), "ultraedit")
    assert (free["edits"], free["failed"]) == (1, "after 1 edits an update is NaN or infinite")
    assert (guarded["edits"], guarded["kept"]) == (2, 0)
    assert guarded["first_reason"] == "the update is not finite"


def test_a_fact_that_does_not_fit_is_not_kept_and_the_others_are(load: Load) -> None:
    work = given(load("llama"), 3, 1)
    long = replace(work.records[1].fact, prompt="where " * 3000 + "{} is")
    work = replace(work, records=[work.records[0], replace(work.records[1], fact=long)])
    stream = hypernetworks._EditStream(work, "ft", False, [], work.loaded_model.canary)
    with work.open_method(FineTuning) as editor:
        for number, record in enumerate(work.records, 1):
            stream._edit_fact(editor, None, record.fact, number)
    assert [number for number, _ in stream.refused] == [2]
    assert "does not fit the model" in stream.refused[0][1]
