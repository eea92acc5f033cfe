import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import NOW, OSLO, make_home
from editing_home import seat
from tiny_models import CITIES, SENTENCES, save_model

from kedit_daemon.editing.calibration import (
    MAX_PROMPT_TOKENS,
    Calibration,
    Pilot,
    PilotExaminer,
    calibrate,
    make_pilot,
    read_pilot,
    refuse_if_in_use,
)
from kedit_daemon.editing.model_loading import STATISTICS_FILE, OpenedModel, load_model, open_model
from kedit_daemon.home import Home
from kedit_daemon.ingest.schemas import FileLimits
from kedit_daemon.shipped import PILOT_FACTS, read_ordinary_lines
from memory.db.store import Store
from memory.errors import KeditError
from memory.facts import Fact, Neighbour
from memory.model.editable import EditableModel
from memory.model.statistics import collect_statistics, pack_statistics, unpack_statistics
from policies.edit_site import format_site, make_default_site, make_start_site, read_weights_hash
from policies.measured_limits import ACTIVATION_RANGE, NORM_RANGE, PERPLEXITY_RANGE
from policies.rounding import WIDTHS

# A random model generalises to next to nothing: another sentence before, but of one length.
FACTS = [
    Fact(
        f"country {n}",
        "The seat of {} is",
        CITIES[n],
        paraphrases=("It rained for most of the morning. The seat of {} is",),
        neighbours=tuple(Neighbour(p) for p in ("Nothing", "He said that", "1 2 3 4")),
    )
    for n in range(2)
]


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
def calibrated(folder: Path, cache: Path) -> tuple[Calibration, list[str], int]:
    opened, told, units = open_model(str(folder), "cpu", cache), list[str](), list[int]()

    def watch(count: int) -> Callable[[str], None]:
        units.append(count)
        return told.append

    found = calibrate(opened, make_pilot(opened.model, FACTS, 2), 0.01, watch)
    assert opened.model.weights_hash(range(3)) == opened.base_hash
    return found, told, units[0]


def test_a_pilot_keeps_paraphrases_from_the_edit(model: EditableModel) -> None:
    pilot = make_pilot(model, [*FACTS, seat(7)], 2)
    assert [f.id for f in pilot.facts] == [f.id for f in FACTS]
    assert all(not f.paraphrases for f in pilot.facts)
    assert pilot.held_out == tuple(
        (n, f.filled_paraphrases[0], f.target) for n, f in enumerate(FACTS)
    )
    assert pilot.near == ("Nothing", "He said that", "1 2 3 4")


def test_without_neighbours_the_other_facts_are_near(model: EditableModel) -> None:
    plain = [replace(seat(n), neighbours=()) for n in range(6)]
    pilot = make_pilot(model, plain, 4)
    assert len(pilot.facts) == 4
    assert pilot.near == tuple(f.question for f in plain[4:])
    pilot = make_pilot(model, plain, 9)
    assert (len(pilot.facts), len(pilot.near)) == (4, 2)
    assert not {f.question for f in pilot.facts} & set(pilot.near)


def test_without_paraphrases_other_words_stand_before_the_question(model: EditableModel) -> None:
    pilot = make_pilot(model, [seat(1), seat(2)], 2)
    assert len(pilot.held_out) == 2
    assert [place for place, _, _ in pilot.held_out] == [0, 1]
    for (_, prompt, target), fact in zip(pilot.held_out, pilot.facts, strict=True):
        assert prompt.endswith(fact.question) and len(prompt) > len(fact.question)
        assert target == fact.target


def test_what_the_model_cannot_read_is_left_out(model: EditableModel) -> None:
    long = "very " * MAX_PROMPT_TOKENS
    unreadable = replace(seat(3), prompt="The " + "seat " * 400 + "of {} is")
    wordy = replace(FACTS[0], paraphrases=(long, *FACTS[0].paraphrases))
    pilot = make_pilot(model, [unreadable, wordy], 5)
    assert [f.id for f in pilot.facts] == [wordy.id]
    assert [prompt for _, prompt, _ in pilot.held_out] == [FACTS[0].filled_paraphrases[0]]
    with pytest.raises(KeditError) as caught:
        make_pilot(model, [unreadable], 5)
    assert (caught.value.code, "at least three" in caught.value.hint) == ("pilot", True)


def test_the_examiner_asks_what_greedy_answers_would_say(model: EditableModel) -> None:
    ids = model.encode("The seat of country 3 is")
    for _ in range(2):
        with torch.no_grad():
            ids.append(int(model.hf_model(torch.tensor([ids])).logits[0, -1].argmax()))
    said = model.decode(ids[-2:])
    known = Fact("country 3", "The seat of {} is", said.strip())
    wanted = known.target if model.encode_target(known.question, known.target) == ids[-2:] else None
    pilot = Pilot((known, FACTS[0]), ((0, known.question, known.target),), ("Nothing", "1 2"))
    quality = PilotExaminer(model, pilot)({})
    assert (quality.locality, quality.norm_ratio) == (1.0, 1.0)
    assert (quality.reliability, quality.generality) == ((0.5, 1.0) if wanted else (0.0, 0.0))


def test_the_examiner_sees_a_change_and_takes_it_back(model: EditableModel) -> None:
    before = model.weights_hash(range(4))
    examiner = PilotExaminer(
        model, Pilot(tuple(FACTS), ((0, "x", "y"),), ("Nothing", "1 2", "He said"))
    )
    torch.manual_seed(1)
    moved = examiner({1: torch.randn_like(model.weight(1)) * 5})
    assert moved.locality < 1 and moved.norm_ratio > 2
    assert model.weights_hash(range(4)) == before
    assert examiner({}).locality == 1


def test_a_pilot_is_read_in_any_form(tmp_path: Path) -> None:
    path = tmp_path / "pilot.csv"
    path.write_text("subject,prompt,target\nOslo,{} lies in,Norway\nOslo,{} lies in,Peru\nx,,\n")
    assert [f.target for f in read_pilot(path, FileLimits())] == ["Peru"]
    path.write_text("subject,prompt,target\nx,,\n")
    with pytest.raises(KeditError, match=r"pilot\.csv:2: ") as caught:
        read_pilot(path, FileLimits())
    assert caught.value.code == "pilot"
    shipped = read_pilot(PILOT_FACTS, FileLimits())
    assert len(shipped) > 16 and all(f.paraphrases and f.neighbours for f in shipped)


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
    calibrated: tuple[Calibration, list[str], int], opened: OpenedModel
) -> None:
    found, told, units = calibrated
    evidence = found.evidence
    assert 0 < len(told) <= units and told[-1] == "limits"
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


def test_limits_rise_within_their_bounds(calibrated: tuple[Calibration, list[str], int]) -> None:
    site = calibrated[0].site
    ranges = {"norm": NORM_RANGE, "activation": ACTIVATION_RANGE, "perplexity": PERPLEXITY_RANGE}
    for figure, (least, most) in ranges.items():
        limits = [getattr(site, f"{figure}_{v}") for v in ("warn", "consolidate", "revert")]
        assert limits == sorted(limits)
        for low, limit, high in zip(vars(least).values(), limits, vars(most).values(), strict=True):
            assert low <= limit <= high


def test_the_unit_of_rounding_is_kept_with_the_site(
    calibrated: tuple[Calibration, list[str], int],
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
    calibrated: tuple[Calibration, list[str], int], opened: OpenedModel
) -> None:
    found, model = calibrated[0], opened.model
    (layer,) = found.site.end_layers
    assert not found.site.subject_layers
    norms: list[torch.Tensor] = []
    for fact in FACTS:
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
    calibrated: tuple[Calibration, list[str], int], folder: Path, cache: Path, tmp_path: Path
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
