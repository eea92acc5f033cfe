from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, save_model
from torch import Tensor

from memory.errors import KeditError
from memory.model.device import has_fast_bfloat16
from memory.model.editable import EditableModel

CPU = torch.device("cpu")
Folder = Callable[[str], Path]


@pytest.fixture(params=list(ARCHITECTURES))
def any_model(request: pytest.FixtureRequest, model_folder: Folder) -> EditableModel:
    return EditableModel.load(model_folder(request.param), CPU)


def two_rows(model: EditableModel) -> Tensor:
    ids = model.encode("The seat of country 11 is Oslo.")
    return torch.tensor([ids, ids[::-1]])


def logits(model: EditableModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.hf_model(input_ids=ids, use_cache=False).logits


def noise(model: EditableModel, layer: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(model.weight(layer).shape, generator=generator) * 0.1


def test_an_output_is_the_weight_times_the_input(any_model: EditableModel) -> None:
    caught: list[tuple[Tensor, Tensor]] = []
    with any_model.tap_layers({1: lambda k, y: caught.append((k, y))}):
        logits(any_model, two_rows(any_model))
    ((inputs, outputs),) = caught
    weight = any_model.weight(1)
    assert weight.shape[0] == any_model.hidden_size < weight.shape[1]
    assert inputs.shape[:2] == outputs.shape[:2] == two_rows(any_model).shape
    bias = getattr(any_model._down_projections[1], "bias", None)
    expected = inputs @ weight.T + (0 if bias is None else bias)
    assert torch.allclose(outputs, expected, atol=1e-5)


def test_a_tap_may_change_an_output_while_it_lasts(any_model: EditableModel) -> None:
    ids = two_rows(any_model)
    plain = logits(any_model, ids)

    def shift_last(_inputs: Tensor, outputs: Tensor) -> Tensor:
        moved = outputs.clone()
        moved[1, -1] += 3.0
        return moved

    with any_model.tap_layers({2: shift_last}):
        changed = logits(any_model, ids)
    assert torch.equal(changed[0], plain[0])
    assert torch.equal(changed[1, :-1], plain[1, :-1])
    assert not torch.allclose(changed[1, -1], plain[1, -1])
    assert torch.equal(logits(any_model, ids), plain)


def test_deltas_are_laid_on_the_base_and_never_stacked(any_model: EditableModel) -> None:
    base = any_model.weight(2).detach().clone()
    delta = noise(any_model, 2)
    any_model.set_deltas({2: delta})
    any_model.set_deltas({2: delta})
    assert torch.equal(any_model.weight(2), base + delta)
    assert torch.equal(any_model.base_weight(2), base)
    any_model.set_deltas({})
    assert torch.equal(any_model.weight(2), base)


def test_a_layer_without_a_delta_goes_back_to_its_base(model: EditableModel) -> None:
    before = model.weights_hash([1, 2])
    model.set_deltas({1: noise(model, 1), 2: noise(model, 2)})
    model.set_deltas({2: noise(model, 2)})
    assert torch.equal(model.weight(1), model.base_weight(1))
    assert not torch.equal(model.weight(2), model.base_weight(2))
    assert model.weights_hash([1, 2]) != before


def test_an_edit_changes_what_the_model_computes(any_model: EditableModel) -> None:
    ids = two_rows(any_model)
    plain = logits(any_model, ids)
    any_model.set_deltas({1: noise(any_model, 1)})
    assert not torch.allclose(logits(any_model, ids), plain)
    any_model.set_deltas({})
    assert torch.equal(logits(any_model, ids), plain)


def test_at_base_shows_the_base_and_then_the_same_bits_again(model: EditableModel) -> None:
    base = model.weight(2).detach().clone()
    model.set_deltas({2: noise(model, 2)})
    model.weight(2).mul_(1.0000001)  # bits that no sum of base and delta would give again
    edited = model.weight(2).detach().clone()
    with model.at_base():
        assert torch.equal(model.weight(2), base)
        with model.at_base():
            assert torch.equal(model.weight(2), base)
        assert torch.equal(model.weight(2), base)
    assert torch.equal(model.weight(2), edited)
    with pytest.raises(RuntimeError, match="stopped"), model.at_base():
        raise RuntimeError("stopped")
    assert torch.equal(model.weight(2), edited)


def test_the_ids_of_each_pass_are_heard_before_it_begins(any_model: EditableModel) -> None:
    heard: list[list[list[int]]] = []

    def hear(ids: torch.Tensor) -> None:
        heard.append(ids.tolist())
        taps.enter_context(any_model.tap_layers({0: lambda _k, _y: heard.append([])}))

    first, second = torch.tensor([[1, 2, 3]]), torch.tensor([[4]])
    with torch.no_grad(), ExitStack() as taps, any_model.observe_input_ids(hear):
        cache = any_model.hf_model(input_ids=first, use_cache=True).past_key_values
        taps.close()
        any_model.hf_model(input_ids=second, past_key_values=cache, use_cache=True)
    with torch.no_grad(), any_model.observe_input_ids(hear):
        pass
    any_model.hf_model(input_ids=first, use_cache=False)
    assert heard == [first.tolist(), [], second.tolist(), []]


def test_a_tap_sees_rows_and_tokens_each_time(any_model: EditableModel) -> None:
    seen: list[tuple[torch.Size, torch.Size]] = []
    for tokens in (3, 2):
        ids = torch.ones(2, tokens, dtype=torch.long)
        with (
            torch.no_grad(),
            any_model.tap_layers({1: lambda k, y: seen.append((k.shape, y.shape))}),
        ):
            any_model.hf_model(input_ids=ids, use_cache=False)
    hidden, width = any_model.weight(1).shape
    assert seen == [((2, n, width), (2, n, hidden)) for n in (3, 2)]


def test_the_hash_is_of_the_named_layers_as_they_are(model: EditableModel) -> None:
    first, both = model.weights_hash([1]), model.weights_hash([1, 2])
    assert first != both
    model.set_deltas({2: noise(model, 2)})
    assert model.weights_hash([1]) == first
    assert model.weights_hash([1, 2]) != both
    model.set_deltas({})
    assert model.weights_hash([1, 2]) == both


def test_the_hash_does_not_depend_on_the_layout(model_folder: Folder) -> None:
    gpt2 = EditableModel.load(model_folder("gpt2"), CPU)
    weight = gpt2.weight(0)
    assert not weight.is_contiguous()  # a Conv1D keeps it the other way round
    stored = load_file(model_folder("gpt2") / "model.safetensors")
    assert torch.equal(weight, stored["transformer.h.0.mlp.c_proj.weight"].T)


@pytest.mark.parametrize(
    ("prompt", "target"),
    [("The seat of country 1 is", "Rome"), ("It is ", "Lima"), ("Say:\n", "Oslo and Rome")],
)
def test_a_targets_ids_continue_the_prompt(model: EditableModel, prompt: str, target: str) -> None:
    ids = model.encode_target(prompt, target)
    joint = prompt + target if prompt[-1].isspace() else f"{prompt} {target}"
    assert model.end_token not in ids
    assert model.decode([*model.encode(prompt), *ids]) == joint


def test_text_keeps_its_special_tokens_to_itself(model: EditableModel) -> None:
    ids = model.encode("Rome")
    assert ids[0] == model.end_token == 0
    assert model.decode(ids) == "Rome"


def test_gradients_may_be_taken_from_lower_products_and_weights_stay(model: EditableModel) -> None:
    ids = torch.tensor([model.encode("Rome lies in Italy")])
    start, before = (
        model.hf_model.get_input_embeddings()(ids),
        model.weights_hash(range(model.layer_count)),
    )

    def gradient() -> Tensor:
        free = start.clone().requires_grad_()
        logits = model.hf_model(inputs_embeds=free, use_cache=False).logits
        loss = logits.float().log_softmax(-1)[0, -1, 5]
        return torch.autograd.grad(loss, free)[0]

    exact = gradient()
    with model.low_precision():
        low, again = gradient(), gradient()
    assert torch.equal(low, again)
    assert low.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(low.flatten(), exact.flatten(), dim=0) > 0.99
    # Without bfloat16 only attention's kernel differs, in the last bits.
    assert torch.allclose(low, exact, rtol=1e-4, atol=1e-6) == (not has_fast_bfloat16(model.device))
    assert not any(p.requires_grad for p in model.hf_model.parameters())
    assert model.weights_hash(range(model.layer_count)) == before
    assert torch.equal(gradient(), exact)


@pytest.mark.parametrize("data", [None, b"", b"x" * 1000, "half"])
def test_files_that_are_broken_are_named_with_a_remedy(
    tmp_path: Path, data: bytes | str | None
) -> None:
    weights = save_model("llama", tmp_path / "broken") / "model.safetensors"
    if data is None:
        weights.unlink()
    else:
        whole = weights.read_bytes()
        weights.write_bytes(whole[: len(whole) // 2] if isinstance(data, str) else data)
    with pytest.raises(KeditError, match="broken") as caught:
        EditableModel.load(tmp_path / "broken", CPU)
    assert (caught.value.code, caught.value.exit_code) == ("model", 78)
    assert "config.json" in caught.value.hint


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeditError, match=str(tmp_path)) as caught:
        EditableModel.load(tmp_path, CPU)
    assert caught.value.code == "model"


@pytest.mark.parametrize(("named", "ends"), [(None, {0}), (7, {0, 7}), ([0, 7, 9], {0, 7, 9})])
def test_an_answer_may_end_in_more_ways_than_one(
    model: EditableModel, named: int | list[int] | None, ends: set[int]
) -> None:
    model.hf_model.generation_config.eos_token_id = named
    assert model.stop_tokens == ends
    assert model.end_token == 0
