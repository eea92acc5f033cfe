import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from memory.errors import KeditError
from policies.edit_site import (
    SITE_FILE,
    EditSite,
    format_site,
    load_site,
    make_default_site,
    make_start_site,
)


def write(folder: Path, **changes: Any) -> EditSite:
    site = {**asdict(make_default_site(8)), "subject_layers": [3], "end_layers": [2], **changes}
    site = {k: v for k, v in site.items() if v is not None}
    (folder / SITE_FILE).write_text(json.dumps({"site": site, "evidence": {"seen": 3}}))
    return load_site(folder, 8)


@pytest.mark.parametrize("layers", [1, 2, 4, 12, 80])
def test_the_default_lies_past_the_middle_of_the_model(layers: int) -> None:
    site = make_default_site(layers)
    assert site.layers == (site.side_layer,)
    assert (layers - 1) / 2 <= site.side_layer <= layers - 1
    assert (site.subject_layers, site.end_layers) == ((), site.layers)
    assert site.end_from == 0  # nothing comes before the end layers


def test_a_model_without_a_measured_site_has_the_default(tmp_path: Path) -> None:
    assert load_site(tmp_path, 8) == make_default_site(8)
    assert load_site(tmp_path / "a hub id", 8) == make_default_site(8)


def test_a_known_type_starts_at_the_published_relative_depth() -> None:
    for layers, subject in ((48, (13, 14, 15, 16, 17)), (12, (3, 4))):
        site = make_start_site("gpt2", layers)
        assert (site.subject_layers, site.end_layers) == (subject, ())
        assert site.prior > 1000


def test_other_models_start_at_the_default() -> None:
    for kind, layers in (("llama", 6), ("opt", 32), ("", 32)):
        assert make_start_site(kind, layers) == make_default_site(layers)


def test_a_measured_site_is_read_as_it_was_written(tmp_path: Path) -> None:
    site = write(tmp_path, subject_gate=0.7, end_gate=0.2, key_layer=1)
    assert (site.subject_layers, site.end_layers) == ((3,), (2,))
    assert (site.subject_gate, site.end_gate, site.key_layer) == (0.7, 0.2, 1)
    assert site.side_layer == make_default_site(8).side_layer


def test_limits_are_the_models_own_where_they_were_measured(tmp_path: Path) -> None:
    names = [
        f"{f}_{v}"
        for f in ("norm", "activation", "perplexity", "confident", "agreement")
        for v in ("warn", "consolidate", "revert")
    ]
    measured = {name: 2.0 + n for n, name in enumerate(names)}
    site = asdict(write(tmp_path, **measured))
    assert {name: site[name] for name in names} == measured
    assert write(tmp_path, **dict.fromkeys(names)) == replace(
        make_default_site(8), subject_layers=(3,), end_layers=(2,)
    )


def test_the_effects_of_rounding_are_by_bits(tmp_path: Path) -> None:
    assert write(tmp_path).rounding_kl == {}
    site = write(tmp_path, rounding_kl={"8": 0.0016, "4": 0.48})
    assert site.rounding_kl == {8: 0.0016, 4: 0.48}
    (tmp_path / SITE_FILE).write_text(format_site(site, {}))
    assert load_site(tmp_path, 8) == site


def test_anchors_are_by_layer_and_come_back_as_they_were_written(tmp_path: Path) -> None:
    assert write(tmp_path).anchors == {}
    site = write(tmp_path, anchors={"2": 4.25, "3": 1.5})
    assert site.anchors == {2: 4.25, 3: 1.5}
    (tmp_path / SITE_FILE).write_text(format_site(site, {}))
    assert load_site(tmp_path, 8) == site
    assert len({site, replace(site, anchors={})}) == 2  # a site is what terms are kept under


@pytest.mark.parametrize("layers", [2, 4, 12, 80])
def test_the_default_reads_subjects_below_the_side_layer(layers: int) -> None:
    assert 0 <= make_default_site(layers).key_layer < make_default_site(layers).side_layer


def test_what_else_was_noted_with_the_site_is_no_matter(tmp_path: Path) -> None:
    assert write(tmp_path, measured_on="a laptop").layers == (2, 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"subject_layers": None},
        {"end_layers": None},
        {"end_from": None},
        {"end_rate": None},
        {"end_prior": None},
        {"subject_gate": None},
        {"end_gate": None},
        {"key_layer": None},
        {"subject_layers": 3},
        {"end_layers": "3"},
    ],
)
def test_a_site_that_cannot_be_used_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(KeditError, match=r"kedit\.json") as caught:
        write(tmp_path, **changes)
    assert (caught.value.code, caught.value.exit_code) == ("config", 78)
    assert "default site" in caught.value.hint


@pytest.mark.parametrize(
    "changes",
    [
        {"subject_layers": [1, 8]},
        {"end_layers": [8]},
        {"end_layers": [-1]},
        {"side_layer": 8},
        {"key_layer": 8},
        {"key_layer": -1},
    ],
)
def test_a_layer_that_the_model_lacks_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(KeditError, match="one of the model's 8"):
        write(tmp_path, **changes)


@pytest.mark.parametrize(
    ("subject", "end"), [([3, 1], [2]), ([2], [1, 3]), ([3, 2, 1], []), ([], [3, 1, 2])]
)
def test_the_edited_layers_are_in_order(tmp_path: Path, subject: list[int], end: list[int]) -> None:
    site = write(tmp_path, subject_layers=subject, end_layers=end)
    assert site.layers == (1, 2, 3)
    assert (list(site.subject_layers), list(site.end_layers)) == (subject, end)


@pytest.mark.parametrize(
    ("subject", "end"), [([1, 2], [2, 3]), ([2], [2]), ([2, 2], [3]), ([], [3, 3])]
)
def test_a_layer_named_twice_is_refused(tmp_path: Path, subject: list[int], end: list[int]) -> None:
    with pytest.raises(KeditError, match=r"kedit\.json: a layer is named") as caught:
        write(tmp_path, subject_layers=subject, end_layers=end)
    assert (caught.value.code, caught.value.exit_code) == ("config", 78)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"sites": {}}', '{"site": []}', "\udcff"])
def test_a_file_that_is_no_site_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / SITE_FILE).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(KeditError) as caught:
        load_site(tmp_path, 8)
    assert caught.value.code == "config"


@pytest.mark.parametrize(
    "changes",
    [
        {"subject_gate": "0.85"},
        {"end_gate": True},
        {"key_layer": 1.5},
        {"norm_warn": "1.2"},
        {"subject_layers": ["2"]},
        {"end_from": 1.5},
        {"end_prior": "1"},
        {"subject_layers": [], "end_layers": []},
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(KeditError) as caught:
        write(tmp_path, **changes)
    assert caught.value.code == "config"


def test_a_published_site_ends_its_targets_with_a_full_stop() -> None:
    start = make_start_site("llama", 30)
    assert (start.target_ending, make_start_site("other", 30).target_ending) == (".", "")
