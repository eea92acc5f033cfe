import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import SENTENCES

from memory.model.canary import Canary, Health
from memory.model.editable import EditableModel

LINES = SENTENCES[:12]
STATEMENTS = [" ".join(line.split()[: 3 + n % 3]) for n, line in enumerate(SENTENCES[:90])]


def perplexity(model: EditableModel) -> float:
    """Per token, from the logits themselves."""
    total, count = 0.0, 0
    for line in LINES:
        ids = torch.tensor([model.encode(line)])
        with torch.no_grad():
            said = model.hf_model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
        total -= float(said.gather(1, ids[0, 1:, None]).sum())
        count += ids.shape[1] - 1
    return math.exp(total / count)


@pytest.fixture
def canary(model: EditableModel) -> Canary:
    return Canary(model, LINES, [1, 2], STATEMENTS)


def test_an_unedited_model_measures_as_its_own_base(model: EditableModel, canary: Canary) -> None:
    health = canary.measure_health()
    assert health.norm_ratio == {"1": 1.0, "2": 1.0}
    assert health.update_norm == {"1": 0.0, "2": 0.0}
    assert health.activation_ratio == {"1": 1.0, "2": 1.0}
    assert health.perplexity_ratio == health.agreement == 1.0
    assert health.kl == 0.0
    assert health.perplexity == pytest.approx(perplexity(model), rel=1e-4)
    assert health.finite


def test_an_edit_shows_in_the_figures_of_its_layer(model: EditableModel, canary: Canary) -> None:
    delta = model.base_weight(2) * 0.5
    model.set_deltas({2: delta})
    health = canary.measure_health()
    assert health.norm_ratio == {"1": 1.0, "2": pytest.approx(1.5)}
    assert health.update_norm == {"1": 0.0, "2": pytest.approx(float(delta.norm()))}
    assert health.activation_ratio == {"1": 1.0, "2": pytest.approx(1.5, rel=1e-4)}
    assert health.perplexity == pytest.approx(perplexity(model), rel=1e-4)
    assert health.perplexity_ratio == pytest.approx(
        health.perplexity / canary.base_readings.perplexity
    )
    assert health.perplexity_ratio != 1.0


def completed(model: EditableModel) -> list[int]:
    found: list[int] = []
    for statement in STATEMENTS:
        ids = torch.tensor([model.encode(statement)])
        with torch.no_grad():
            found.append(int(model.hf_model(input_ids=ids, use_cache=False).logits[0, -1].argmax()))
    return found


def test_agreement_is_the_share_of_statements_that_are_completed_as_before(
    model: EditableModel, canary: Canary
) -> None:
    base = completed(model)
    model.set_deltas({2: model.base_weight(2) * 0.3})
    now = completed(model)
    share = sum(a == b for a, b in zip(now, base, strict=True)) / len(base)
    assert 0 < share < 1
    assert canary.measure_health().agreement == pytest.approx(share)


def make_confident(model: EditableModel) -> EditableModel:
    """Make the random model sure of some statements."""
    with torch.no_grad():
        model.hf_model.get_output_embeddings().weight.mul_(12)
    return model


def test_confident_agreement_leaves_out_what_the_base_only_guesses(model: EditableModel) -> None:
    canary = Canary(make_confident(model), LINES, [1, 2], STATEMENTS)
    sure = [float(row.max()) >= 0.3 for row in next_tokens(model)]
    base = completed(model)
    model.set_deltas({2: model.base_weight(2) * 0.3})
    kept = [a == b for a, b in zip(completed(model), base, strict=True)]
    counted = [same for same, counts in zip(kept, sure, strict=True) if counts]
    assert 30 <= len(counted) < len(STATEMENTS) and 0 < sum(counted) < len(counted)
    health = canary.measure_health()
    assert (sum(canary.is_confident), health.confident_statements) == (sum(sure), sum(sure))
    assert health.confident_agreement == pytest.approx(sum(counted) / len(counted))
    assert health.agreement == pytest.approx(sum(kept) / len(kept))
    assert health.agreement != pytest.approx(health.confident_agreement)


def test_too_few_confident_statements_have_no_share(model: EditableModel) -> None:
    canary = Canary(make_confident(model), LINES, [1, 2], STATEMENTS[:30])
    health = canary.measure_health()
    assert 0 < health.confident_statements < 30
    assert (health.confident_agreement, health.agreement) == (None, 1.0)


def next_tokens(model: EditableModel) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for statement in STATEMENTS:
        ids = torch.tensor([model.encode(statement)])
        with torch.no_grad():
            logits = model.hf_model(input_ids=ids, use_cache=False).logits[0, -1]
        found.append(logits.double().softmax(-1))
    return found


def test_kl_is_from_the_base_to_what_comes_after_the_statements_now(
    model: EditableModel, canary: Canary
) -> None:
    base = next_tokens(model)
    model.set_deltas({2: model.base_weight(2) * 0.3})
    now = next_tokens(model)
    each = [float((p * (p / q).log()).sum()) for p, q in zip(base, now, strict=True)]
    assert max(each) > 2 * min(each) > 0
    assert canary.measure_health().kl == pytest.approx(sum(each) / len(each), rel=1e-4)


def test_a_token_that_the_base_rules_out_adds_nothing_to_kl(model: EditableModel) -> None:
    model.hf_model.get_output_embeddings().register_forward_hook(_rule_out)
    canary = Canary(model, LINES, [2], STATEMENTS)
    model.set_deltas({2: model.base_weight(2) * 0.3})
    assert 0 < canary.measure_health().kl < math.inf


def _rule_out(_module: object, _inputs: object, logits: torch.Tensor) -> torch.Tensor:
    return logits.index_fill(-1, torch.tensor([7]), -math.inf)


def test_without_statements_nothing_disagrees(model: EditableModel) -> None:
    canary = Canary(model, LINES, [2])
    model.set_deltas({2: model.base_weight(2) * 5})
    health = canary.measure_health()
    assert (health.agreement, health.kl) == (1.0, 0.0)


def test_the_baseline_is_of_the_base_also_when_read_on_an_edited_model(
    model: EditableModel, canary: Canary
) -> None:
    model.set_deltas({2: model.base_weight(2) * 0.5})
    edited = model.weights_hash([1, 2])
    assert Canary(model, LINES, [1, 2], STATEMENTS).base_readings == canary.base_readings
    assert model.weights_hash([1, 2]) == edited


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_noticed(
    model: EditableModel, canary: Canary, bad: float
) -> None:
    delta = torch.zeros_like(model.base_weight(2))
    delta[0, 0] = bad
    model.set_deltas({2: delta})
    health = canary.measure_health()
    assert not health.finite
    assert not math.isfinite(health.norm_ratio["2"])
    assert not math.isfinite(health.perplexity)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_entry_planted_in_memory_is_noticed(
    model: EditableModel, canary: Canary, bad: float
) -> None:
    model.set_deltas({2: torch.zeros_like(model.base_weight(2))})
    assert canary.measure_health().finite
    with torch.no_grad():
        model.weight(2)[3, 5] = bad  # behind the model's back
    health = canary.measure_health()
    assert not math.isfinite(health.norm_ratio["2"])
    assert not math.isfinite(health.update_norm["2"])
    assert not math.isfinite(health.kl)
    assert not health.finite


def test_a_perplexity_beyond_all_numbers_is_infinite_and_no_error(
    model: EditableModel, canary: Canary
) -> None:
    with torch.no_grad():
        model.hf_model.get_output_embeddings().weight.mul_(1e5)
    health = canary.measure_health()
    assert health.perplexity == math.inf
    assert not health.finite


def test_lines_too_short_to_say_anything_are_left_out(model: EditableModel, canary: Canary) -> None:
    again = Canary(model, [*LINES, "Rome", ""], [1, 2], STATEMENTS)
    assert again.base_readings == canary.base_readings


def test_the_figures_are_json(canary: Canary) -> None:
    figures = canary.measure_health().as_dict()
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert set(figures) == set(Health.__dataclass_fields__)


@pytest.mark.parametrize("where", ["perplexity", "norm_ratio"])
def test_the_figures_are_json_also_when_not_finite(canary: Canary, where: str) -> None:
    bad = {"perplexity": math.nan, "norm_ratio": {"1": math.inf}}
    figures = Health(**{**vars(canary.measure_health()), where: bad[where]}).as_dict()
    json.dumps(figures, allow_nan=False)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "gptj"])
def test_other_layouts_measure_alike(kind: str, model_folder: Callable[[str], Path]) -> None:
    model = EditableModel.load(model_folder(kind), torch.device("cpu"))
    canary = Canary(model, LINES, [1])
    assert canary.measure_health().perplexity == pytest.approx(perplexity(model), rel=1e-4)
    model.set_deltas({1: model.base_weight(1).clone()})
    assert canary.measure_health().norm_ratio["1"] == pytest.approx(2.0)
