import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from broken_models import REFUSED, change_settings, change_weights, make_refused
from safetensors.torch import load_file
from tiny_models import ARCHITECTURES, make_tokenizer, save_model
from transformers import AutoModelForCausalLM

from memory.errors import UnusableModel
from memory.model.editable import EditableModel
from memory.model.strict_loading import check_model_folder

CPU = torch.device("cpu")
Folder = Callable[[str], Path]


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_whole_is_refused_with_what_was_found(
    name: str, model_folder: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = make_refused(name, model_folder("llama"), tmp_path / "model")
    _, found, remedy = REFUSED[name]
    capfd.readouterr()
    for use in (check_model_folder, lambda path: EditableModel.load(path, CPU)):
        with pytest.raises(UnusableModel) as caught:
            use(folder)
        assert re.search(found, str(caught.value)), str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
        assert remedy in caught.value.hint
        assert caught.value.exit_code == 78
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_is_whole_passes_without_a_word(
    kind: str, model_folder: Folder, capfd: pytest.CaptureFixture[str]
) -> None:
    check_model_folder(model_folder(kind))
    EditableModel.load(model_folder(kind), CPU)
    assert capfd.readouterr() == ("", "")


def test_tensors_that_older_versions_saved_do_no_harm(model_folder: Folder, tmp_path: Path) -> None:
    mask = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    leftovers = {
        "gpt2": ["transformer.h.1.attn.bias", "transformer.h.1.attn.masked_bias"],
        "gptj": ["transformer.h.1.attn.bias", "transformer.h.1.attn.masked_bias"],
        "gpt_neox": ["gpt_neox.layers.1.attention.bias", "gpt_neox.layers.1.attention.masked_bias"],
        "llama": ["model.layers.1.self_attn.rotary_emb.inv_freq"],
    }
    for kind, names in leftovers.items():
        folder = copied(model_folder(kind), tmp_path / kind)
        change_weights(folder, lambda t, names=names: t.update({n: mask.clone() for n in names}))
        check_model_folder(folder)
        EditableModel.load(folder, CPU)


def test_special_tokens_of_other_uses_need_no_row(model_folder: Folder, tmp_path: Path) -> None:
    folder = copied(model_folder("llama"), tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    assert EditableModel.load(folder, CPU).encode("Rome")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shards_of_any_float_with_and_without_tied_embeddings(
    tmp_path: Path, dtype: torch.dtype, tied: bool
) -> None:
    whole = EditableModel.load(
        save_model("llama", tmp_path / "whole", tie_word_embeddings=tied), CPU
    )
    whole.hf_model.to(dtype).save_pretrained(tmp_path / "parts", max_shard_size="60KB")
    whole.tokenizer.save_pretrained(tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    check_model_folder(tmp_path / "parts")
    loaded = EditableModel.load(tmp_path / "parts", CPU)
    output = loaded.hf_model.get_output_embeddings().weight
    assert (output is loaded.hf_model.get_input_embeddings().weight) == tied
    assert output.dtype == torch.float32
    layers = range(loaded.layer_count)
    assert loaded.weights_hash(layers) == whole.weights_hash(layers)


def test_a_shard_that_is_missing_is_named(model_folder: Folder, tmp_path: Path) -> None:
    whole = EditableModel.load(model_folder("llama"), CPU)
    whole.hf_model.save_pretrained(tmp_path, max_shard_size="60KB")
    whole.tokenizer.save_pretrained(tmp_path)
    lost = sorted(tmp_path.glob("*.safetensors"))[1]
    lost.unlink()
    for use in (check_model_folder, lambda path: EditableModel.load(path, CPU)):
        with pytest.raises(UnusableModel, match=lost.name):
            use(tmp_path)


def test_embeddings_that_are_tied_may_be_saved_twice(model_folder: Folder, tmp_path: Path) -> None:
    folder = copied(model_folder("llama"), tmp_path / "model")
    change_settings(folder, tie_word_embeddings=True)
    check_model_folder(folder)
    loaded = EditableModel.load(folder, CPU)
    stored = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(loaded.hf_model.get_output_embeddings().weight, stored)


def test_memory_that_runs_out_is_not_the_models_fault(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", run_out)
    with pytest.raises(MemoryError):
        EditableModel.load(model_folder("llama"), CPU)
