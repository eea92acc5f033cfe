"""GGUF files become checkpoints that answer as the model they were made from."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file
from tiny_gguf import write_gguf
from tiny_models import save_model

from memory.errors import UnusableModel
from memory.model.editable import EditableModel
from memory.model.gguf_conversion import convert_gguf, count_numbers

CPU = torch.device("cpu")
PROMPT = "The seat of country 11 is Oslo."
Folder = Callable[[str], Path]


def convert(file: Path, to: Path) -> Path:
    to.mkdir()
    convert_gguf(file, to, count_numbers(file))
    return to


def logits(model: EditableModel) -> torch.Tensor:
    with torch.no_grad():
        return model.hf_model(torch.tensor([model.encode(PROMPT)]), use_cache=False).logits


@pytest.mark.parametrize("tied", [True, False])
def test_a_file_in_float32_gives_the_same_model(tmp_path: Path, tied: bool) -> None:
    """Of grouped queries, too: their rows are stored in another order."""
    changes = {"num_key_value_heads": 1, "tie_word_embeddings": tied}
    folder = save_model("llama", tmp_path / "whole", **changes)
    converted = convert(write_gguf(folder, tmp_path / "tiny.gguf"), tmp_path / "converted")
    whole, again = (EditableModel.load(f, CPU) for f in (folder, converted))
    assert again.encode(PROMPT) == whole.encode(PROMPT)
    assert again.decode(again.encode(PROMPT)) == PROMPT
    assert again.stop_tokens == whole.stop_tokens
    assert torch.equal(logits(again), logits(whole))
    layers = range(whole.layer_count)
    assert again.weights_hash(layers) == whole.weights_hash(layers)


@pytest.mark.parametrize(
    ("kind", "off"), [(Kind.F16, 1e-3), (Kind.BF16, 1e-2), (Kind.Q8_0, 1e-2), (Kind.Q4_1, 0.1)]
)
def test_quantised_weights_become_the_numbers_they_stand_for(
    model_folder: Folder, tmp_path: Path, kind: Kind, off: float
) -> None:
    file = write_gguf(model_folder("llama"), tmp_path / "tiny.gguf", kind)
    whole = load_file(model_folder("llama") / "model.safetensors")
    found = load_file(convert(file, tmp_path / "converted") / "model.safetensors")
    assert found.keys() == whole.keys()
    for name, tensor in whole.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - tensor).norm() <= off * tensor.norm(), name


def test_what_is_written_may_be_read_by_others(model_folder: Folder, tmp_path: Path) -> None:
    converted = convert(
        write_gguf(model_folder("llama"), tmp_path / "tiny.gguf"), tmp_path / "converted"
    )
    modes = {path.stat().st_mode for path in converted.iterdir()}
    assert modes == {(tmp_path / "tiny.gguf").stat().st_mode}


def test_rotary_frequencies_need_no_place(model_folder: Folder, tmp_path: Path) -> None:
    more = {"rope_freqs.weight": torch.ones(8)}
    convert(write_gguf(model_folder("llama"), tmp_path / "tiny.gguf", more=more), tmp_path / "to")


def write_text(_: Path, file: Path) -> None:
    file.write_text("no model at all")


def cut(folder: Path, file: Path) -> None:
    write_gguf(folder, file)
    file.write_bytes(file.read_bytes()[:60_000])


REFUSED: dict[str, tuple[Callable[[Path, Path], object], str, str]] = {
    "text": (write_text, "cannot be read: GGUF magic invalid", "the whole file"),
    "empty": (lambda _, file: file.touch(), "cannot be read", "the whole file"),
    "cut": (cut, "cannot be read", "the whole file"),
    "a part": (lambda *at: write_gguf(*at, parts=3), "is one of 3 parts", "llama-gguf-split"),
    "foreign": (
        lambda *at: write_gguf(*at, architecture="bert"),
        "architecture bert is not supported",
        "Llama",
    ),
    "missing": (
        lambda *at: write_gguf(*at, without="blk.2.ffn_down.weight"),
        "1 tensor is missing .*layers.2.mlp.down_proj",
        "all files",
    ),
    "more": (
        lambda *at: write_gguf(*at, more={"blk.2.attn_q.bias": torch.ones(32)}),
        "holds 75840 numbers, and its architecture has 75808",
        "the whole file",
    ),
    "mismatched": (
        lambda *at: write_gguf(*at, more={"output_norm.weight": torch.ones(16)}),
        r"1 tensor is of another shape .*\(16,\) instead of \(32,\)",
        "all files",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_no_whole_model_is_refused(
    name: str, model_folder: Folder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, found, remedy = REFUSED[name]
    file = tmp_path / "tiny.gguf"
    make(model_folder("llama"), file)
    capfd.readouterr()
    with pytest.raises(UnusableModel, match=found) as caught:
        convert(file, tmp_path / "to")
    assert (caught.value.exit_code, len(str(caught.value).splitlines())) == (78, 1)
    assert str(file) in str(caught.value)
    assert remedy in caught.value.hint
    assert capfd.readouterr() == ("", "")
