import json
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kedit_daemon import shipped
from kedit_daemon.config import SHIPPED_MODEL
from kedit_daemon.editing import known_measurements, model_loading
from kedit_daemon.editing.known_measurements import STATISTICS_FILE
from kedit_daemon.editing.measurement_cache import make_key
from kedit_daemon.editing.model_loading import (
    CanaryTexts,
    LoadedModel,
    load_model,
    open_model,
    read_canary_texts,
    read_pieces,
)
from kedit_daemon.editing.side_learner import OUTSIDE_LINES
from kedit_daemon.shipped import KNOWN_MODELS, read_ordinary_lines
from memory.errors import KeditError
from memory.model.generate import generate_answers
from memory.model.statistics import unpack_statistics
from policies.edit_site import format_site, load_site, read_weights_hash


def test_statistics_are_measured_once_and_cached(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, measured, collect = str(model_folder("llama")), [], model_loading.collect_statistics

    def counted(*given: object) -> object:
        measured.append(given)
        return collect(*given)

    monkeypatch.setattr(model_loading, "collect_statistics", counted)
    first = load_model(folder, "cpu", tmp_path, iter)
    (cached,) = tmp_path.glob("statistics-*")
    second = load_model(folder, "cpu", tmp_path, iter)
    assert (len(measured), list(tmp_path.glob("statistics-*"))) == (1, [cached])
    assert first.base_hash == second.base_hash
    for n, layer in first.statistics.items():
        assert torch.equal(layer.covariance, second.statistics[n].covariance)
    assert set(first.layers) <= set(first.statistics)


@pytest.mark.parametrize("damage", [None, 200])
def test_statistics_of_an_older_version_get_their_sha256(
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: int | None,
) -> None:
    folder, measured, collect = str(model_folder("llama")), [], model_loading.collect_statistics

    def counted(*given: object) -> object:
        measured.append(given)
        return collect(*given)

    first = load_model(folder, "cpu", tmp_path, iter)
    (named,) = tmp_path.glob("statistics-*")
    older = named.rename(named.with_stem(named.stem.rpartition("-")[0]))
    if damage is not None:
        older.write_bytes(older.read_bytes()[:damage])
    monkeypatch.setattr(model_loading, "collect_statistics", counted)
    again = load_model(folder, "cpu", tmp_path, iter)
    assert len(measured) == (0 if damage is None else 1)
    assert list(tmp_path.glob("statistics-*")) == [named]
    for n, layer in first.statistics.items():
        assert torch.equal(layer.covariance, again.statistics[n].covariance)


def test_the_shipped_model_knows_its_site_and_some_facts(tmp_path: Path) -> None:
    loaded = load_model(SHIPPED_MODEL, "cpu", tmp_path, iter)
    assert (loaded.site.subject_layers, loaded.site.end_layers) == ((1, 2), (3,))
    assert loaded.layers == (1, 2, 3)
    assert (loaded.site.side_layer, loaded.site.key_layer) == (4, 2)
    assert not list(tmp_path.glob("statistics-*"))
    known = {
        "The capital of France is": "Paris",
        "Saarland is located in": "Germany",
        "Bob Dylan plays": "guitar",
    }
    assert generate_answers(loaded.model, list(known), 6) == list(known.values())


def test_the_shipped_statistics_are_small_and_cover_every_layer_in_use() -> None:
    folder = shipped.MODEL
    data = (folder / STATISTICS_FILE).read_bytes()
    assert len(data) < 10_000_000
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    width, hidden = config["intermediate_size"], config["hidden_size"]
    site = load_site(folder, config["num_hidden_layers"])
    found = unpack_statistics(data)
    assert set(found) == {*site.layers, site.side_layer, site.key_layer}
    for n, layer in found.items():
        assert layer.output_mean.shape == (hidden,) and layer.median_norm > 0
        assert layer.covariance.shape == ((width, width) if n in site.layers else (0, 0))
        assert bool(torch.isfinite(layer.covariance).all())
        assert n not in site.layers or float(layer.covariance.diagonal().min()) > 0


@pytest.fixture
def start(
    model_folder: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> Callable[..., tuple[LoadedModel, torch.Tensor, int]]:
    """Starts with a model: what is loaded, and how many things had to be measured for it."""
    caplog.set_level("INFO")
    all_texts = read_canary_texts()
    few = CanaryTexts(all_texts.lines[:6], all_texts.statements[:24])

    def start(texts: CanaryTexts = few) -> tuple[LoadedModel, torch.Tensor, int]:
        caplog.clear()
        loaded = load_model(str(model_folder("llama")), "cpu", tmp_path, iter, texts)
        inputs = loaded.opened.resolve_ordinary_inputs(loaded.site.side_layer, 8)
        return loaded, inputs, sum("once for this model" in text for text in caplog.messages)

    return start


Start = Callable[..., tuple[LoadedModel, torch.Tensor, int]]


def test_a_second_start_measures_nothing_and_finds_the_same_figures(start: Start) -> None:
    first, first_inputs, measured = start()
    second, second_inputs, again = start()
    assert (measured, again) == (3, 0)
    assert torch.equal(first_inputs, second_inputs)
    assert second.canary.base_readings == first.canary.base_readings
    delta = first.model.base_weight(first.layers[0]) * 0.1
    figures = []
    for loaded in (first, second):
        loaded.model.set_deltas({first.layers[0]: delta})
        health = loaded.canary.measure_health()
        figures.append((health, loaded.canary.latest_readings))
    assert figures[0][0] == figures[1][0] and figures[0][0].kl > 0
    for one, other in zip(
        first.canary.base_readings.end_activations,
        second.canary.base_readings.end_activations,
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["canary", "inputs"])
def test_what_is_damaged_is_measured_again(start: Start, tmp_path: Path, kind: str) -> None:
    first, inputs, _ = start()
    (path,) = tmp_path.glob(f"{kind}-*")
    whole = path.read_bytes()
    path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    second, again, measured = start()
    assert measured == 1 and path.read_bytes() == whole
    assert second.canary.base_readings == first.canary.base_readings
    assert torch.equal(inputs, again)


def test_other_texts_are_measured_and_old_files_leave(start: Start, tmp_path: Path) -> None:
    texts = read_canary_texts()
    for count in range(20, 25):
        measured = start(CanaryTexts(texts.lines[:6], texts.statements[:count]))[2]
        assert measured == (3 if count == 20 else 1)
    assert len(list(tmp_path.glob("canary-*"))) == model_loading.MOST_KEPT
    assert start(CanaryTexts(texts.lines[:6], texts.statements[:22]))[2] == 0
    assert start(CanaryTexts(texts.lines[:5], texts.statements[:23]))[2] == 1


def test_a_full_disk_stops_no_start(start: Start, tmp_path: Path) -> None:
    start()
    for path in [*tmp_path.glob("canary-*"), *tmp_path.glob("inputs-*")]:
        path.unlink()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # no longer file can be written
    try:
        assert start()[2] == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not [*tmp_path.glob("canary-*"), *tmp_path.glob("inputs-*"), *tmp_path.glob(".*.tmp")]


def test_measurements_of_known_weights_are_found_in_the_package(
    start: Start,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = start()[0]
    known = tmp_path_factory.mktemp("package")
    monkeypatch.setattr(known_measurements, "KNOWN_MODELS", known)
    folder = known_measurements.locate_known(loaded.base_hash)
    assert folder.parent == known and loaded.base_hash.startswith(folder.name)
    folder.mkdir()
    site = replace(loaded.site, side_layer=3, end_gate=0.625)
    (folder / "kedit.json").write_text(format_site(site, {"weights": loaded.base_hash}))
    (path,) = tmp_path.glob("statistics-*")
    (folder / STATISTICS_FILE).write_bytes(path.read_bytes())
    path.unlink()
    opened = open_model(str(model_folder("llama")), "cpu", tmp_path)
    assert opened.resolve_site() == site
    found = opened.resolve_statistics(loaded.site.layers, (loaded.site.key_layer,), iter)
    assert found.keys() == loaded.statistics.keys()
    assert not list(tmp_path.glob("statistics-*"))  # nothing had to be measured
    other = open_model(str(model_folder("gpt2")), "cpu", tmp_path)
    assert other.resolve_site() != site


def test_a_calibration_of_ones_own_comes_before_the_packages(
    start: Start,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = start()[0]
    monkeypatch.setattr(known_measurements, "KNOWN_MODELS", tmp_path_factory.mktemp("package"))
    folder = known_measurements.locate_known(loaded.base_hash)
    folder.mkdir()
    for place, gate in ((folder, 0.625), (tmp_path, 0.75)):
        text = format_site(replace(loaded.site, end_gate=gate), {"weights": loaded.base_hash})
        (place / "kedit.json").write_text(text)
    assert loaded.opened.resolve_site().end_gate == 0.75


def test_what_is_shipped_of_known_models_is_small_and_whole() -> None:
    folders = list(KNOWN_MODELS.glob("*"))
    sizes = [path.stat().st_size for folder in folders for path in folder.iterdir()]
    assert sum(sizes) <= 10_000_000
    sites = [path.parent for path in KNOWN_MODELS.glob("*/kedit.json")]
    assert sites
    for folder in sites:
        assert (read_weights_hash(folder / "kedit.json") or "").startswith(folder.name)
        layers = unpack_statistics((folder / STATISTICS_FILE).read_bytes())
        site = load_site(folder, max(layers) + 1)
        assert set(layers) == {*site.layers, site.side_layer, site.key_layer}


def test_a_model_that_is_not_there_is_bad_configuration(tmp_path: Path) -> None:
    with pytest.raises(KeditError) as caught:
        load_model(str(tmp_path / "nothing"), "cpu", tmp_path, iter)
    assert caught.value.exit_code == 78


def test_there_is_ordinary_text() -> None:
    assert len(read_ordinary_lines()) > 200


def test_inputs_that_the_package_ships_are_not_measured(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded, measured, _ = start()
    opened, layer = loaded.opened, loaded.site.side_layer
    monkeypatch.setattr(known_measurements, "KNOWN_MODELS", tmp_path / "known")
    ids = [loaded.model.encode(piece) for piece in read_pieces(8)]
    path = known_measurements.locate_known(loaded.base_hash) / known_measurements.INPUTS_FILE
    path.parent.mkdir(parents=True)
    shipped = {
        make_key(loaded.base_hash, layer, ids): measured + 1,
        make_key("other weights", layer, ids): measured + 2,
    }
    save_file(shipped, path)
    caplog.clear()
    assert torch.equal(opened.resolve_ordinary_inputs(layer, 8), measured + 1)
    assert torch.equal(opened.resolve_ordinary_inputs(layer, 7), measured[:7])  # other texts
    assert sum("once for this model" in text for text in caplog.messages) == 1


def test_what_is_shipped_of_the_real_models_inputs_is_whole() -> None:
    (path,) = known_measurements.KNOWN_MODELS.glob(f"*/{known_measurements.INPUTS_FILE}")
    (inputs,) = load_file(path).values()
    assert inputs.shape == (OUTSIDE_LINES, 1536)
    assert bool(torch.isfinite(inputs).all())
