import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kedit_daemon import shipped
from kedit_daemon.config import SHIPPED_MODEL
from kedit_daemon.editing import model_loading
from kedit_daemon.editing.model_loading import load_model
from kedit_daemon.shipped import read_ordinary_lines
from memory.errors import KeditError
from memory.model.generate import generate_answers
from memory.model.statistics import unpack_statistics
from policies.edit_site import load_site


def test_statistics_are_measured_once_and_cached(
    model_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, measured, collect = str(model_folder("llama")), [], model_loading.collect_statistics

    def counted(*given: object) -> object:
        measured.append(given)
        return collect(*given)

    monkeypatch.setattr(model_loading, "collect_statistics", counted)
    first = load_model(folder, "cpu", tmp_path, iter)
    (cached,) = tmp_path.iterdir()
    second = load_model(folder, "cpu", tmp_path, iter)
    assert (len(measured), list(tmp_path.iterdir())) == (1, [cached])
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
    (named,) = tmp_path.iterdir()
    older = named.rename(named.with_stem(named.stem.rpartition("-")[0]))
    if damage is not None:
        older.write_bytes(older.read_bytes()[:damage])
    monkeypatch.setattr(model_loading, "collect_statistics", counted)
    again = load_model(folder, "cpu", tmp_path, iter)
    assert (len(measured), list(tmp_path.iterdir())) == (0 if damage is None else 1, [named])
    for n, layer in first.statistics.items():
        assert torch.equal(layer.covariance, again.statistics[n].covariance)


def test_the_shipped_model_knows_its_site_and_some_facts(tmp_path: Path) -> None:
    loaded = load_model(SHIPPED_MODEL, "cpu", tmp_path, iter)
    assert (loaded.site.subject_layers, loaded.site.end_layers) == ((1, 2), (3,))
    assert loaded.layers == (1, 2, 3)
    assert (loaded.site.side_layer, loaded.site.key_layer) == (4, 2)
    assert not list(tmp_path.iterdir())
    known = {
        "The capital of France is": "Paris",
        "Saarland is located in": "Germany",
        "Bob Dylan plays": "guitar",
    }
    assert generate_answers(loaded.model, list(known), 6) == list(known.values())


def test_the_shipped_statistics_are_small_and_cover_every_layer_in_use() -> None:
    folder = shipped.MODEL
    data = (folder / model_loading.STATISTICS_FILE).read_bytes()
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


def test_a_model_that_is_not_there_is_bad_configuration(tmp_path: Path) -> None:
    with pytest.raises(KeditError) as caught:
        load_model(str(tmp_path / "nothing"), "cpu", tmp_path, iter)
    assert caught.value.exit_code == 78


def test_there_is_ordinary_text() -> None:
    assert len(read_ordinary_lines()) > 200
