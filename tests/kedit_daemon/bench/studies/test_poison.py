from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from editing_home import LOOSE
from study_tools import given

from kedit_daemon.bench.methods import daemon_tiers
from kedit_daemon.bench.plot import open_figure
from kedit_daemon.bench.studies import poison_plan
from kedit_daemon.bench.studies.poison import PoisonStudy
from kedit_daemon.config import Config
from kedit_daemon.editing import audit
from kedit_daemon.editing.model_loading import LoadedModel
from kedit_daemon.editing.repair import Damage

Load = Callable[[str], LoadedModel]
NORM = 30.0  # of the base: far above that of honest facts, far below that of a hundredfold one


def bounded(norm: float) -> dict[str, Any]:
    """The only limit is that of the norm."""
    norms = {f"norm_{verdict}": norm for verdict in ("warn", "consolidate", "revert")}
    return {"stability": LOOSE["stability"] | norms}


@pytest.fixture(autouse=True)
def configured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models learn slowly, and have no healthy figures but a norm that is not absurd."""
    settings = bounded(NORM) | {"side": {"steps": 150}}
    monkeypatch.setattr(daemon_tiers, "build_config", lambda _: Config.model_validate(settings))


def of(result: dict[str, Any], kind: str) -> dict[str, Any]:
    (row,) = (row for row in result["rows"] if row["kind"] == kind)
    return row


def only(result: dict[str, Any], kind: str) -> dict[str, Any]:
    (plant,) = of(result, kind)["plants"]
    return plant


def test_poison_is_judged_by_what_the_daemon_has_done(
    load: Load, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    maker = poison_plan._PoisonMaker
    monkeypatch.setattr(maker, "_make_contradiction", maker._make_paraphrased)
    study = PoisonStudy(("contradiction", "absurd norm", "long target"), 1)
    result = study.run(given(load("llama"), 7, 100))
    assert [row["batch"] for row in result["rows"]] == [1, 2, 3]
    long = only(result, "long target")
    assert long["stopped"] and long["by"][0].startswith("line 1: the target has ")
    for plant in of(result, "absurd norm")["plants"]:
        assert plant["stopped"]
        assert "norm of layer" in plant["by"][0], plant["by"]
    # The daemon learns both, and says both: a miss.
    clash = only(result, "contradiction")
    assert not clash["stopped"] and clash["alive"].startswith("the two questions are answered ")
    total, plants = result["totals"], [p for row in result["rows"] for p in row["plants"]]
    assert total["stopped"] == sum(p["stopped"] for p in plants) < total["planted"] == len(plants)
    assert total["recall"] == sum(p["named"] for p in plants) / len(plants)
    assert (total["precision"], result["lost"], total["silent"]) == (1, [], 0)
    lines = list(study.format_lines(result))
    misses = [line for line in lines if line.startswith("MISS")]
    assert sum("contradiction" in line and "not stopped" in line for line in misses) == 1
    assert not any("absurd norm" in line for line in misses)
    pytest.importorskip("matplotlib")
    with open_figure(tmp_path / "out.png") as (left, right):
        study.draw_curves(result, left, right)
    assert len(left.patches) == 9 and len(right.lines) == 2


def test_of_two_facts_that_contradict_each_other_to_the_letter_the_later_one_stands(
    load: Load,
) -> None:
    result = PoisonStudy(("contradiction",), 2).run(given(load("llama"), 5, 100))
    assert {row["way"] for row in result["rows"]} == {"to the letter", "in other words"}
    (plant,) = (r["plants"][0] for r in result["rows"] if r["way"] == "to the letter")
    assert plant["stopped"] and plant["by"][0].startswith("superseded: superseded by ")


def test_a_nan_is_found_wherever_it_is(load: Load) -> None:
    result = PoisonStudy(("NaN",)).run(given(load("llama"), 9, 100))
    ways = {row["way"]: row for row in result["rows"]}
    assert set(ways) == {"live shard", "live weights", "live fact's targets", "waiting targets"}
    total = result["totals"]
    assert (total["stopped"], total["whole"], total["recall"], total["precision"]) == (4, 4, 1, 1)
    assert (total["lost"], total["reverts"], total["silent"]) == (0, 0, 0)
    assert [row["held"] for row in result["rows"]] == [1] * 4
    assert ways["live weights"]["held_harmed"] == 0
    assert ways["live weights"]["plants"][0]["facts"] == ["the weights"]
    assert 0 < ways["live shard"]["held_harmed"] < 1


def test_who_is_not_named_is_a_miss_though_it_is_stopped(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "find_damage", lambda *_: Damage([], False, False, []))
    study = PoisonStudy(("NaN",), 1)
    result = study.run(given(load("llama"), 2, 100))
    plant = only(result, "NaN")
    # Asked again, the fact is not stated, and so it is learned again; nobody sees why.
    assert (plant["stopped"], plant["named"], result["totals"]["recall"]) == (True, False, 0)
    (miss,) = (line for line in study.format_lines(result) if line.startswith("MISS"))
    assert miss == f"MISS  1 NaN, live shard: not named, now live-side ({plant['stated'][0]})"


def test_innocent_facts_that_end_are_wrongly_named_and_lost(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = bounded(1 + 1e-6) | {"side": {"steps": 1}}  # neither tier takes anything
    monkeypatch.setattr(daemon_tiers, "build_config", lambda _: Config.model_validate(settings))
    study = PoisonStudy(("long target",), 1)
    result = study.run(given(load("llama"), 3, 100))
    total = result["totals"]
    assert len(result["rows"][0]["wrongly"]) == total["lost"] == total["innocent"] == 2
    assert (total["precision"], total["recall"], total["silent"]) == (pytest.approx(1 / 3), 1, 1)
    assert sum(line.startswith("LOST") for line in study.format_lines(result)) == 2
