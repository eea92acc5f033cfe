import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import SENTENCES

from memory.model.canary import Canary
from memory.model.editable import EditableModel
from memory.model.evidence import Evidence, EvidenceCollector
from memory.model.spectra import linear_cka

EDITED = (1, 2)
LINES = SENTENCES[:6]
STATEMENTS = [" ".join(line.split()[: 5 + n % 2]) for n, line in enumerate(SENTENCES[::8])]
EVERY = ["0", "1", "2", "3"]


def taken(examiner: EvidenceCollector, facts: int = 4) -> Evidence:
    examiner.canary.measure_health()
    return examiner.collect_evidence(
        facts, examiner.model.weights_hash(EDITED), examiner.canary.latest_readings
    )


@pytest.fixture
def examiner(model: EditableModel) -> EvidenceCollector:
    return EvidenceCollector(Canary(model, LINES, EDITED, STATEMENTS))


def outer(model: EditableModel, *strengths: float) -> torch.Tensor:
    """A change (hidden, width) with these singular values."""
    delta = torch.zeros_like(model.base_weight(1))
    for n, strength in enumerate(strengths):
        delta[n, n + 3] = strength
    return delta


def singular(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(matrix.detach().double())


def test_an_unedited_model_is_like_its_base(examiner: EvidenceCollector) -> None:
    found = taken(examiner, facts=0)
    for name in ("update_per_root", "stable_rank", "effective_rank"):
        assert getattr(found, name) == {"1": 0, "2": 0}
    assert found.spectral_ratio == {"1": 1, "2": 1}
    assert found.weight_shift == {n: pytest.approx(0, abs=1e-9) for n in ("1", "2")}
    assert found.activation_norm == dict.fromkeys(EVERY, 1)
    assert found.activation_cka == {n: pytest.approx(1) for n in EVERY}
    assert found.activation_shift == {n: pytest.approx(0, abs=1e-9) for n in EVERY}


def test_a_change_shows_in_the_spectra_of_its_matrix(examiner: EvidenceCollector) -> None:
    model = examiner.model
    base = singular(model.weight(1))
    model.set_deltas({1: outer(model, 40.0, 20.0)})
    found = taken(examiner, facts=25)
    now = singular(model.weight(1))
    assert found.spectral_ratio == {"1": pytest.approx(float(now[0] / base[0])), "2": 1}
    assert found.update_per_root == {"1": pytest.approx(math.sqrt(2000) / 5), "2": 0}
    assert found.stable_rank == {"1": pytest.approx(1.25), "2": 0}
    shares = (2 / 3, 1 / 3)
    entropy = -sum(s * math.log(s) for s in shares)
    assert found.effective_rank == {"1": pytest.approx(math.exp(entropy)), "2": 0}


def test_the_shift_of_a_matrix_is_of_its_sixteen_strongest_directions(
    examiner: EvidenceCollector,
) -> None:
    model = examiner.model
    base = torch.linalg.svd(model.weight(2).detach().double()).U[:, :16]
    model.set_deltas({2: outer(model, 9.0, 8.0, 7.0)})
    now = torch.linalg.svd(model.weight(2).detach().double()).U[:, :16]
    cosines = torch.linalg.svdvals(base.T @ now)
    expected = 1 - float(cosines.square().mean())
    assert 0.01 < expected < 0.9
    assert taken(examiner).weight_shift["2"] == pytest.approx(expected, rel=1e-6)


def outputs(model: EditableModel, text: str, layer: int) -> torch.Tensor:
    """What a layer's down projection gives (tokens, hidden), by itself."""
    caught: list[torch.Tensor] = []
    with torch.no_grad(), model.tap_layers({layer: lambda _k, y: caught.append(y[0].clone())}):
        model.hf_model(input_ids=torch.tensor([model.encode(text)]), use_cache=False)
    return caught[0]


def ends(model: EditableModel, layer: int) -> torch.Tensor:
    return torch.stack([outputs(model, s, layer)[-1] for s in STATEMENTS])


def test_activations_of_every_layer_are_compared(examiner: EvidenceCollector) -> None:
    model = examiner.model

    def norm(layer: int) -> float:
        rows = [outputs(model, line, layer)[1:] for line in LINES]
        return float(torch.cat(rows).norm(dim=1).mean())

    def principal(activations: torch.Tensor) -> torch.Tensor:
        centred = (activations - activations.mean(0)).double()
        return torch.linalg.svd(centred).Vh[:8].T

    layers = range(model.layer_count)
    base = [(norm(n), ends(model, n)) for n in layers]
    model.set_deltas({1: outer(model, 9.0, 8.0, 7.0)})
    found = taken(examiner)
    for n, (length, was) in enumerate(base):
        now = ends(model, n)
        assert found.activation_norm[str(n)] == pytest.approx(norm(n) / length, rel=1e-4)
        assert found.activation_cka[str(n)] == pytest.approx(linear_cka(was, now), rel=1e-4)
        shift = 1 - float((principal(was).T @ principal(now)).square().sum()) / 8
        assert found.activation_shift[str(n)] == pytest.approx(shift, abs=1e-4)
    assert found.activation_cka["0"] == pytest.approx(1)
    assert all(found.activation_cka[n] < 0.999 for n in EVERY[1:])
    assert all(found.activation_shift[n] > 1e-3 for n in EVERY[1:])


def test_the_base_is_the_unedited_model_also_when_first_asked_later(model: EditableModel) -> None:
    early = EvidenceCollector(Canary(model, LINES, EDITED, STATEMENTS))
    taken(early)
    model.set_deltas({1: outer(model, 9.0)})
    late = EvidenceCollector(Canary(model, LINES, EDITED, STATEMENTS))
    assert taken(late) == taken(early)


def test_spectra_are_taken_again_when_the_weights_have_changed(examiner: EvidenceCollector) -> None:
    model = examiner.model
    model.set_deltas({1: outer(model, 9.0)})
    first = taken(examiner, facts=4)
    assert first.update_per_root["1"] == pytest.approx(4.5)
    assert taken(examiner, facts=9).update_per_root["1"] == pytest.approx(3.0)
    model.set_deltas({1: outer(model, 9.0, 9.0)})
    assert taken(examiner).stable_rank["1"] == pytest.approx(2)
    model.set_deltas({1: outer(model, 9.0)})
    assert taken(examiner) == first
    with torch.no_grad():
        model.weight(1).mul_(3)  # behind the model's back
    assert taken(examiner).spectral_ratio["1"] == pytest.approx(3 * first.spectral_ratio["1"])


def test_spectra_of_the_same_weights_are_not_taken_again(examiner: EvidenceCollector) -> None:
    model = examiner.model
    mark = model.weights_hash(EDITED)
    before = examiner.collect_evidence(1, mark, examiner.canary.latest_readings)
    model.set_deltas({1: outer(model, 9.0)})
    examiner.canary.measure_health()
    after = examiner.collect_evidence(
        1, mark, examiner.canary.latest_readings
    )  # by a mark that tells of no change
    assert after.spectral_ratio == before.spectral_ratio
    assert after.activation_cka != before.activation_cka


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_written_down_and_no_error(
    examiner: EvidenceCollector, bad: float
) -> None:
    model = examiner.model
    model.set_deltas({2: outer(model, 1.0)})
    taken(examiner)
    with torch.no_grad():
        model.weight(2)[0, 0] = bad
    found = taken(examiner).as_dict()
    for name in ("spectral_ratio", "stable_rank", "effective_rank", "weight_shift"):
        assert found[name]["2"] == "nan"  # type: ignore[index]
        assert found[name]["1"] != "nan"  # type: ignore[index]
    for name in ("activation_norm", "activation_cka", "activation_shift"):
        assert found[name]["2"] in ("nan", "inf")  # type: ignore[index]
        assert found[name]["1"] != "nan"  # type: ignore[index]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.parametrize("count", [0, 3])
def test_too_few_statements_say_nothing_of_directions(model: EditableModel, count: int) -> None:
    found = taken(EvidenceCollector(Canary(model, LINES, EDITED, STATEMENTS[:count])))
    assert (found.activation_cka, found.activation_shift) == ({}, {})
    assert set(found.activation_norm) == set(EVERY)


def test_fewer_statements_are_compared_in_fewer_directions(model: EditableModel) -> None:
    examiner = EvidenceCollector(Canary(model, LINES, EDITED, STATEMENTS[:9]))
    taken(examiner)
    was = [ends(model, n)[:9] for n in range(4)]
    model.set_deltas({1: outer(model, 9.0)})
    now = ends(model, 3)[:9]
    top = [torch.linalg.svd((a - a.mean(0)).double()).Vh[:2].T for a in (was[3], now)]
    shift = 1 - float((top[0].T @ top[1]).square().sum()) / 2
    assert taken(examiner).activation_shift["3"] == pytest.approx(shift, abs=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_other_layouts_are_examined_alike(kind: str, model_folder: Callable[[str], Path]) -> None:
    model = EditableModel.load(model_folder(kind), torch.device("cpu"))
    examiner = EvidenceCollector(Canary(model, LINES, EDITED, STATEMENTS))
    model.set_deltas({1: model.base_weight(1) * 0.5})
    found = taken(examiner)
    assert found.spectral_ratio["1"] == pytest.approx(1.5)
    assert found.weight_shift["1"] == pytest.approx(0, abs=1e-6)
    assert found.activation_cka["1"] == pytest.approx(1, abs=1e-3)
