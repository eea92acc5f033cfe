import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import NOW, OSLO, make_home
from pilot_facts import PILOT
from tiny_models import SENTENCES, save_model

from kedit_daemon.editing.calibration import WORK_FILE, Calibration, calibrate, refuse_if_in_use
from kedit_daemon.editing.known_measurements import STATISTICS_FILE
from kedit_daemon.editing.model_loading import OpenedModel, load_model, open_model
from kedit_daemon.editing.pilot import make_pilot
from kedit_daemon.home import Home
from kedit_daemon.shipped import read_ordinary_lines
from memory.db.store import Store
from memory.errors import KeditError
from memory.model.statistics import collect_statistics, pack_statistics, unpack_statistics
from policies.edit_site import format_site, make_default_site, make_start_site, read_weights_hash
from policies.measured_limits import ACTIVATION_RANGE, NORM_RANGE, PERPLEXITY_RANGE
from policies.rounding import WIDTHS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("three"), num_hidden_layers=3)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def opened(folder: Path, cache: Path) -> OpenedModel:
    return open_model(str(folder), "cpu", cache)


@pytest.fixture(scope="module")
def calibrated(
    folder: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Calibration, list[str]]:
    opened, told = open_model(str(folder), "cpu", cache), list[str]()
    work = tmp_path_factory.mktemp("work")
    pilot = make_pilot(opened.model, PILOT, 2)
    found = calibrate(opened, pilot, 0.01, 1e9, work, told.append)
    assert opened.model.weights_hash(range(3)) == opened.base_hash
    assert not work.exists()
    return found, told


def test_a_calibration_that_was_cut_off_is_taken_up(folder: Path, tmp_path: Path) -> None:
    opened = open_model(str(folder), "cpu", tmp_path)
    pilot, work = make_pilot(opened.model, PILOT, 2), tmp_path / "work"

    def run(stop_at: str) -> list[str]:
        work.mkdir(exist_ok=True)
        told: list[str] = []

        def report(what: str) -> None:
            told.append(what)
            if what.startswith(stop_at):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            calibrate(opened, pilot, 0.01, 1e9, work, report)
        return told

    first, then = run("final"), run("limits")
    assert not {*first[1:-1]} & {*then}  # the statistics are looked up, the last was not done
    assert first[-1] in then
    (work / WORK_FILE).write_text("{")
    assert {*first} <= {*run("limits")}


def test_a_home_with_terms_or_facts_in_the_weights_is_refused(tmp_path: Path) -> None:
    refuse_if_in_use(Home(tmp_path / "none"))
    home = make_home(tmp_path / "home")  # it has a fact in the weights
    with pytest.raises(KeditError, match="facts in the weights 1, stored terms 0") as caught:
        refuse_if_in_use(home)
    assert (caught.value.code, "init" in caught.value.hint) == ("in-use", True)
    other = Home(tmp_path / "other")
    other.create_folders()
    store = Store(other.database_file, lambda: NOW)
    with store.db.transaction():
        store.receive_fact(OSLO, "facts.jsonl", False)
    refuse_if_in_use(other)
    with store.db.transaction():
        store.artifacts.put_terms(OSLO.id, b"terms")
    store.close()
    with pytest.raises(KeditError, match="stored terms 1"):
        refuse_if_in_use(other)


def test_a_calibration_holds_the_figures_behind_it(
    calibrated: tuple[Calibration, list[str]], opened: OpenedModel
) -> None:
    found, told = calibrated
    evidence = found.evidence
    assert told[0] == "statistics of all layers" and told[-2:] == ["limits", "end gate"]
    assert evidence["weights"] == opened.base_hash
    assert evidence["pilot"] == {"facts": 2, "held_out": 2, "near": 3}
    assert evidence["chosen"] in evidence["candidates"]
    assert evidence["chosen"]["score"] > 0
    assert set(evidence["clean_norms"]) == set(found.site.anchors) == set(found.site.layers)
    assert set(evidence["activation_variation"]) == set(found.site.layers)
    assert all(norm > 1 for norm, _ in evidence["norm_and_activation_change"])
    assert evidence["end_gate"]["gate"] == found.site.end_gate
    assert evidence["end_gate"]["pairs"] == 2 * len(read_ordinary_lines())
    assert evidence["end_gate"]["false_routes"] == pytest.approx(0.01, abs=1e-3)
    assert json.loads(format_site(found.site, evidence))["evidence"]["rules"]


def test_limits_rise_within_their_bounds(calibrated: tuple[Calibration, list[str]]) -> None:
    site = calibrated[0].site
    ranges = {"norm": NORM_RANGE, "activation": ACTIVATION_RANGE, "perplexity": PERPLEXITY_RANGE}
    for figure, (least, most) in ranges.items():
        limits = [getattr(site, f"{figure}_{v}") for v in ("warn", "consolidate", "revert")]
        assert limits == sorted(limits)
        for low, limit, high in zip(vars(least).values(), limits, vars(most).values(), strict=True):
            assert low <= limit <= high


def test_the_unit_of_rounding_is_kept_with_the_site(
    calibrated: tuple[Calibration, list[str]],
) -> None:
    site, evidence = calibrated[0].site, calibrated[0].evidence
    assert [row["bits"] for row in evidence["rounding"]] == list(WIDTHS)
    assert site.rounding_kl == {row["bits"]: row["kl"] for row in evidence["rounding"]}
    # A random model is sure of nothing: all statements count, and that is said.
    assert evidence["confident_statements"] < 30
    assert evidence["agreement_counted_on"] == "agreement"
    assert {row["confident_agreement"] for row in evidence["rounding"]} == {None}
    assert site.agreement_warn is not None and site.agreement_revert is not None
    assert 0 < site.agreement_warn < site.agreement_revert


def test_a_clean_norm_is_that_of_the_outputs_at_the_tokens_that_are_edited(
    calibrated: tuple[Calibration, list[str]], opened: OpenedModel
) -> None:
    found, model = calibrated[0], opened.model
    (layer,) = found.site.end_layers
    assert not found.site.subject_layers
    norms: list[torch.Tensor] = []
    for fact in PILOT:
        for context in ("", "It rained for most of the afternoon. "):
            prompt = model.encode(context + fact.question)
            target = [
                *model.encode_target(context + fact.question, fact.target),
                model.end_token or 0,
            ]
            seen: list[torch.Tensor] = []
            with (
                torch.no_grad(),
                model.tap_layers({layer: lambda _k, y, seen=seen: seen.append(y)}),
            ):
                model.hf_model(torch.tensor([prompt + target]))
            norms.append(seen[0][0, len(prompt) - 1 : -1].norm(dim=-1))
    assert found.evidence["clean_norms"][layer] == pytest.approx(float(torch.cat(norms).median()))


def test_a_model_is_loaded_with_what_was_measured_for_it(
    calibrated: tuple[Calibration, list[str]], folder: Path, cache: Path, tmp_path: Path
) -> None:
    found = calibrated[0]
    text = format_site(found.site, found.evidence)
    (tmp_path / "kedit.json").write_text(text)
    loaded = load_model(str(folder), "cpu", tmp_path, iter)
    assert loaded.site == found.site != make_start_site("llama", 3)
    assert set(loaded.layers) <= {n for n, s in loaded.statistics.items() if len(s.covariance)}
    assert read_weights_hash(tmp_path / "kedit.json") == loaded.base_hash
    # Measured on other weights, it says nothing of these.
    (tmp_path / "kedit.json").write_text(format_site(found.site, {"weights": "others"}))
    assert open_model(str(folder), "cpu", tmp_path).resolve_site() == make_start_site("llama", 3)
    # Written by hand, it is taken at its word.
    by_hand = replace(make_default_site(3), key_layer=1)
    (tmp_path / "kedit.json").write_text(format_site(by_hand, {}))
    assert open_model(str(folder), "cpu", tmp_path).resolve_site() == by_hand


def test_a_site_in_the_home_that_cannot_be_used_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "kedit.json").write_text("{")
    with pytest.raises(KeditError, match=r"kedit\.json") as caught:
        open_model(str(folder), "cpu", tmp_path).resolve_site()
    assert caught.value.exit_code == 78


def test_layers_without_shipped_statistics_are_measured(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "cache").mkdir()
    opened = open_model(str(tmp_path / "model"), "cpu", tmp_path / "cache")
    shipped = pack_statistics(collect_statistics(opened.model, SENTENCES, (0,), (1,)))
    (tmp_path / "model" / STATISTICS_FILE).write_bytes(shipped)
    assert set(opened.resolve_statistics((0,), (1,), iter)) == {0, 1}
    assert not list((tmp_path / "cache").iterdir())
    found = opened.resolve_statistics((0, 1), (2,), iter)
    assert [len(found[n].covariance) > 0 for n in range(3)] == [True, True, False]
    assert torch.equal(found[0].covariance, unpack_statistics(shipped)[0].covariance)
    assert len(list((tmp_path / "cache").iterdir())) == 1
