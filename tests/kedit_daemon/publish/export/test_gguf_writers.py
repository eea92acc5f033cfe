"""Exports for llama.cpp: the model's own GGUF file with the edit in it, and a LoRA adapter."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from editing_home import Bench
from export_tools import FACTS, filled, logits, served, still, written
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from tiny_gguf import write_gguf

from kedit_daemon.cli.commands.export import KINDS
from kedit_daemon.editing.gguf_cache import SOURCE_FILE, GgufCache
from kedit_daemon.publish.export import gguf_writers
from kedit_daemon.publish.export.create_export import create_export
from kedit_daemon.publish.export.gguf_writers import round_weight
from kedit_daemon.publish.export.writers import WRITERS
from memory.errors import KeditError
from memory.files import hash_file
from memory.model.editable import EditableModel
from memory.model.gguf_file import GgufFile

EXACT, ANY = 0.0, 1e9  # shares of the change that may be lost


@pytest.fixture(scope="module")
def at(
    model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    """A home with facts in the weights of a quantised file, which no test may change."""
    root = tmp_path_factory.mktemp("quantised")
    file = write_gguf(model_folder("llama"), root / "tiny.gguf", Kind.Q8_0)
    (root / "cache").mkdir()
    made = filled(root / "home", file, root / "cache")
    yield made
    made.store.close()


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def edited_weights(at: Bench) -> dict[str, np.ndarray[Any, Any]]:
    model = at.loaded.model
    return {f"blk.{n}.ffn_down.weight": model.weight(n).numpy() for n in at.loaded.layers}


@pytest.mark.parametrize(("most", "kinds"), [(EXACT, {"F32"}), (ANY, {"Q8_0"})])
def test_gguf_is_the_models_own_file_but_for_the_edited_matrices(
    at: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: float, kinds: set[str]
) -> None:
    monkeypatch.setattr(gguf_writers, "MOST_LOST", most)
    found = written(at.home, "gguf", tmp_path / "gguf").manifest_entries
    base, new = Path(at.loaded.name), tmp_path / "gguf/model.gguf"
    old_reader, new_reader = GGUFReader(base), GGUFReader(new)
    start = old_reader.tensors[0].field.offset
    assert bytes(new_reader.data[:start]) == bytes(old_reader.data[:start])
    before, after, weights = tensors(base), tensors(new), edited_weights(at)
    assert list(after) == list(before)
    assert (found["dtypes"].keys(), set(found["dtypes"].values())) == (weights.keys(), kinds)
    for name, tensor in before.items():
        if name not in weights:
            assert after[name].tensor_type == tensor.tensor_type
            assert after[name].data.tobytes() == tensor.data.tobytes()
            continue
        delta = weights[name] - GgufFile(base).get_tensor(name).unpack()
        off = np.linalg.norm(GgufFile(new).get_tensor(name).unpack() - weights[name])
        assert found["rounding"][name] == pytest.approx(off / np.linalg.norm(delta), abs=1e-6)
        assert after[name].data.tobytes() != tensor.data.tobytes()
        assert off <= (1e-2 * np.linalg.norm(weights[name]) if most else 0)


def test_a_larger_type_keeps_a_change_that_its_own_would_lose(
    at: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_writers, "MOST_LOST", ANY)
    own = written(at.home, "gguf", tmp_path / "own").manifest_entries["rounding"]
    monkeypatch.setattr(gguf_writers, "MOST_LOST", 0.9 * min(own.values()))
    found = written(at.home, "gguf", tmp_path / "larger")
    assert set(found.manifest_entries["dtypes"].values()) == {"F16"}
    assert all(lost < own[name] for name, lost in found.manifest_entries["rounding"].items())
    assert "are F16, which loses up to" in found.notes[0]


@pytest.mark.parametrize(
    ("own", "width", "largest", "kind"),
    [
        (Kind.Q6_K, 256, 1.0, Kind.Q8_0),  # which can only be read
        (Kind.Q6_K, 33, 1.0, Kind.F16),  # no whole number of blocks
        (Kind.Q4_0, 64, 1.0, Kind.Q8_0),
        (Kind.Q8_0, 64, 1.0, Kind.Q8_0),
        (Kind.BF16, 64, 1.0, Kind.BF16),
        (Kind.F16, 33, 1e6, Kind.F32),  # infinite in 16 bits
        (Kind.F32, 64, 1.0, Kind.F32),
    ],
)
def test_the_type_of_an_edited_matrix(own: Kind, width: int, largest: float, kind: Kind) -> None:
    weight = np.linspace(-largest, largest, 32 * width, dtype=np.float32).reshape(32, width)
    size = 0.05 * float(np.linalg.norm(weight))
    packed, lost = round_weight(weight, size, own)
    assert packed.kind == kind
    assert lost <= gguf_writers.MOST_LOST


def test_the_file_answers_as_the_weights_do(
    at: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_writers, "MOST_LOST", EXACT)
    written(at.home, "gguf", tmp_path / "gguf")
    folder = GgufCache(tmp_path / "cache").find_checkpoint(tmp_path / "gguf/model.gguf")
    again = EditableModel.load(folder, torch.device("cpu"))
    assert (logits(again.hf_model, again.tokenizer) - served(at)).abs().max() <= 1e-5


def test_the_factors_of_an_adapter_give_the_change(at: Bench, tmp_path: Path) -> None:
    rank = written(at.home, "gguf-lora", tmp_path / "lora").manifest_entries["rank"]
    reader = GGUFReader(tmp_path / "lora/adapter.gguf")
    told = {name: field.contents() for name, field in reader.fields.items()}
    assert told["general.type"] == "adapter"
    assert told["general.architecture"] == "llama"
    assert (told["adapter.type"], told["adapter.lora.alpha"]) == ("lora", rank)
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert len(found) == 2 * len(at.loaded.layers)
    for n in at.loaded.layers:
        a, b = (found[f"blk.{n}.ffn_down.weight.lora_{part}"] for part in "ab")
        delta = at.served.active_deltas[n].numpy()
        hidden, width = delta.shape
        assert (list(a.shape), list(b.shape)) == ([width, rank], [rank, hidden])
        assert np.linalg.norm(b.data @ a.data - delta) <= 1e-4 * np.linalg.norm(delta)


def test_the_same_state_gives_the_same_bytes(at: Bench, tmp_path: Path) -> None:
    for kind, file in (("gguf", "model.gguf"), ("gguf-lora", "adapter.gguf")):
        made = create_export(at.home, kind, tmp_path / "out", None)
        assert made.placed.path.name.startswith(f"tiny.gguf-gen-1-{kind}-")
        assert made.placed.manifest["files"].keys() == {file}
        assert create_export(at.home, kind, tmp_path / "out", None).placed.existed


def test_what_bears_nothing_is_the_models_own(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    file = write_gguf(model_folder("llama"), tmp_path / "tiny.gguf", Kind.F16)
    (tmp_path / "cache").mkdir()
    at = filled(tmp_path / "home", file, tmp_path / "cache", FACTS[:1])
    with at.store.db.transaction():
        name = f"blk.{still(at, at.home, at.store)}.ffn_down.weight"
    found = written(at.home, "gguf", tmp_path / "still").manifest_entries
    assert len(found["dtypes"]) == len(at.loaded.layers) - 1
    stored = tensors(tmp_path / "still/model.gguf")[name].data
    assert stored.tobytes() == tensors(file)[name].data.tobytes()
    at.editor.revert([FACTS[0].id], None, False)
    written(at.home, "gguf", tmp_path / "gguf")
    assert hash_file(tmp_path / "gguf/model.gguf") == hash_file(file)
    with pytest.raises(KeditError, match="no fact is in the weights"):
        written(at.home, "gguf-lora", tmp_path / "lora")
    at.store.close()


@pytest.mark.parametrize(("kind", "instead"), [("gguf", "merged"), ("gguf-lora", "lora")])
def test_a_model_of_another_format_is_refused(
    model_folder: Callable[[str], Path],
    statistics_cache: Path,
    tmp_path: Path,
    kind: str,
    instead: str,
) -> None:
    folder = shutil.copytree(model_folder("llama"), tmp_path / "tiny")
    at = filled(tmp_path / "home", folder, statistics_cache, FACTS[:1])
    with pytest.raises(KeditError, match="was not opened from a GGUF file") as caught:
        create_export(at.home, kind, tmp_path / "out", None)
    assert f"export {instead}, and convert it" in caught.value.hint
    assert not list((tmp_path / "out").iterdir())
    at.store.close()


def test_a_file_with_other_numbers_than_those_edited_is_refused(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """The identity that the cache knows a file by is forged here."""
    file = write_gguf(model_folder("llama"), tmp_path / "tiny.gguf", Kind.F16)
    (tmp_path / "cache").mkdir()
    at = filled(tmp_path / "home", file, tmp_path / "cache", FACTS[:1])
    written(at.home, "merged", tmp_path / "merged")  # it is in the cache now
    name = f"blk.{at.loaded.layers[0]}.ffn_down.weight"
    place = tensors(file)[name].data_offset
    with file.open("r+b") as opened:
        opened.seek(place)
        opened.write(b"\1\1")
    found = file.stat()
    identity = [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
    (known,) = at.home.models_folder.glob(f"*/{SOURCE_FILE}")
    known.write_text(json.dumps(identity))
    for kind in ("gguf", "gguf-lora"):
        with pytest.raises(KeditError, match=f"{name} in .*/tiny.gguf is not the matrix"):
            written(at.home, kind, tmp_path / kind)
        assert not list((tmp_path / kind).iterdir())
    at.store.close()


def test_every_kind_of_the_command_has_a_writer() -> None:
    assert set(KINDS) == {*WRITERS, "facts"}
