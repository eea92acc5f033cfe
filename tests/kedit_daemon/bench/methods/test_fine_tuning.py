from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from editing_home import seat
from torch import Tensor

from kedit_daemon.bench.methods import fine_tuning
from kedit_daemon.bench.methods.fine_tuning import (
    LORA_RANK,
    TEXT_ROWS,
    AnchoredTuning,
    DistilledTuning,
    FineTuning,
    Lora,
    Pretraining,
    ReplayedTuning,
    WideTuning,
)
from kedit_daemon.bench.methods.method import MethodSetup
from kedit_daemon.bench.scoring import check_stated
from kedit_daemon.editing.model_loading import LoadedModel
from memory.model.generate import generate_answers

FACTS = [seat(1, "Oslo"), seat(2, "Lima"), seat(3, "Cairo")]
Load = Callable[[str], LoadedModel]


@pytest.fixture
def setup(load: Load, tmp_path: Path) -> MethodSetup:
    return MethodSetup(load("llama"), tmp_path, batch_size=2, seed=0)


def get_delta(method: FineTuning) -> Tensor:
    (layer,) = method.layers
    return method.deltas[layer]


def changed_weight(method: FineTuning) -> Tensor:
    (layer,) = method.layers
    return method.model.weight(layer) - method.model.base_weight(layer)


def test_fine_tuning_says_the_targets_and_stops(setup: MethodSetup) -> None:
    model, method = setup.loaded_model.model, FineTuning(setup)
    for _ in range(4):  # a random model learns slowly
        method.edit(FACTS)
    said = generate_answers(model, [f.question for f in FACTS], 12)
    assert said == ["Oslo", "Lima", "Cairo"]  # and nothing after: the end is learned too


def test_fine_tuning_changes_one_layer_and_goes_on_from_what_it_has(setup: MethodSetup) -> None:
    model, method = setup.loaded_model.model, FineTuning(setup)
    method.edit(FACTS[:1])
    first = get_delta(method).clone()
    changed = [
        n for n in range(model.layer_count) if not model.weight(n).equal(model.base_weight(n))
    ]
    assert changed == [setup.loaded_model.site.layers[-1]]
    method.edit(FACTS[1:])
    moved = (get_delta(method) - first).norm()
    assert 0 < moved < 2 * first.norm() and not get_delta(method).equal(first)
    found = changed_weight(method)
    assert found.allclose(get_delta(method), atol=1e-5)
    assert set(method.stopwatch.seconds_by_part) == {"steps"}


def test_lora_adds_a_change_of_low_rank_for_every_batch(setup: MethodSetup) -> None:
    method = Lora(setup)
    method.edit(FACTS[:1])
    first = get_delta(method).clone()
    method.edit(FACTS[1:])
    for change in (first, get_delta(method) - first):
        values = torch.linalg.svdvals(change)
        assert values[LORA_RANK - 1] > 0 and values[LORA_RANK] < 1e-4 * values[0]
    assert torch.linalg.svdvals(get_delta(method))[LORA_RANK] > 1e-3
    found = changed_weight(method)
    assert found.allclose(get_delta(method), atol=1e-5)
    again = Lora(setup)
    again.edit(FACTS[:1])
    assert get_delta(again).equal(first)


def test_lora_says_the_targets_and_stops(setup: MethodSetup) -> None:
    method = Lora(setup)
    for _ in range(4):  # a random model learns slowly
        method.edit(FACTS)
    assert generate_answers(method.model, [f.question for f in FACTS], 12) == [
        "Oslo",
        "Lima",
        "Cairo",
    ]


def learn(method: FineTuning) -> FineTuning:
    for _ in range(4):
        method.edit(FACTS)
    return method


def strain(method: FineTuning) -> float:
    return float(torch.stack([delta.norm() for delta in method.deltas.values()]).norm())


def test_an_anchor_keeps_the_change_small(
    setup: MethodSetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = strain(learn(FineTuning(setup)))
    monkeypatch.setattr(fine_tuning, "ANCHOR_WEIGHT", 10.0)
    assert strain(learn(AnchoredTuning(setup))) < 0.9 * plain


def test_distillation_keeps_ordinary_text(setup: MethodSetup) -> None:
    text = DistilledTuning(setup)  # before an edit

    def diverge(method: FineTuning) -> float:
        method.replace_deltas(method.deltas)
        return float(text.compute_penalty([]))

    assert diverge(text) == pytest.approx(0, abs=1e-6)
    plain = diverge(learn(FineTuning(setup)))
    assert diverge(learn(DistilledTuning(setup))) < 0.7 * plain


def test_replay_keeps_the_earlier_facts(setup: MethodSetup) -> None:
    held = {}
    for kind in (FineTuning, ReplayedTuning):
        method = kind(setup)
        for fact in FACTS:
            for _ in range(3):
                method.edit([fact])
        held[kind] = sum(check_stated(method.model, FACTS))
    assert held[ReplayedTuning] == 3 > held[FineTuning]


@pytest.mark.parametrize("kind", [WideTuning, Pretraining])
def test_every_layer_is_trained(kind: type[FineTuning], setup: MethodSetup) -> None:
    method = learn(kind(setup))
    assert method.edited_layers == tuple(range(method.model.layer_count))
    assert all(bool(delta.any()) for delta in method.deltas.values())


def test_pretraining_goes_on_through_the_text(setup: MethodSetup) -> None:
    method = Pretraining(setup)
    first, second = method.choose_rows(FACTS[:1]), method.choose_rows(FACTS[1:2])
    assert len(first) == len(second) == 1 + TEXT_ROWS
    assert not set(first) & set(second)
    stated = method.model.decode(first[0].ids)
    assert stated.strip().endswith("The seat of country 1 is Oslo.")
    assert len(first[0].target) == len(first[0].ids) - 1  # every token but the first
